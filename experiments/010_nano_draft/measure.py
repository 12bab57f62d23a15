"""How often a draft and all before it were accepted, by place, of prompts from held-out documents.

python experiments/010_nano_draft/measure.py RUN
"""

import json
import sys
from pathlib import Path

import v4jax
from v4jax.datasets.rows import TextRows
from v4jax.datasets.source import open_source
from v4jax.train import config_file

PROMPTS, PROMPT, NEW = 16, 64, 64


def main(run):
    config = config_file.read("draft_nano")
    held_out = TextRows(open_source(config.data, config.model).held_out, seed=0)
    prompts = [held_out.row(i, 0, PROMPT, 0).ids.tolist() for i in range(PROMPTS)]
    found = {}
    for draft, path, width in (("dspark", Path(run) / "model", 5), ("mtp", "nano", 2)):
        model, params = v4jax.load(path, dtype="float32", weights="float32")
        for temperature in (0.0, 0.9):
            with v4jax.Engine(model, params, max_length=256, draft=draft) as engine:
                options = {"temperature": temperature, "seed": 0}
                made = engine.generate(prompts, max_new_tokens=NEW, **options)
                stats = engine.stats()
            tokens = sum(map(len, made.tokens))
            line = {"acceptance": stats["acceptance"], "tokens": tokens, "width": width}
            line["tokens_per_round"] = round(1 + sum(stats["acceptance"]), 3)
            found[f"{draft} at temperature {temperature}"] = line
            print(draft, temperature, line, flush=True)
    text = json.dumps(found, indent=1) + "\n"
    Path(__file__).with_name("measured.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
