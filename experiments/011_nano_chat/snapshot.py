"""The model of a run that has not ended, from its newest checkpoint, and what it has learnt so far.

    python experiments/011_nano_chat/snapshot.py RUN OUT

Copies the checkpoint first, so that the run goes on undisturbed. Prints the share of held-out
tokens that are the likeliest ones where they ought to be said, for each kind of turn.
"""

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

import config
import jax
import jax.numpy as jnp
import numpy as np

import v4jax
from v4jax.datasets.chat_rows import VALUE, Renderer
from v4jax.datasets.conversations import READERS, TOOLS, draw
from v4jax.files.tokenizer_json import read_tokenizer
from v4jax.train import export
from v4jax.train.run import open_run

LENGTH, EACH = 1024, 8
KINDS = {
    "talk": (),
    "tell": (),
    "ask": (),
    "unknown": (),
    "read": (),
    "look": TOOLS,
    "retry": READERS,
    "lost": READERS,
    "no_tool": TOOLS[:2],
    "chain": READERS[:3],
}


def exported(run: Path, out: Path) -> None:
    """The newest checkpoint of a run as a model, float32."""
    with tempfile.TemporaryDirectory() as copy, contextlib.ExitStack() as stack:
        shutil.copytree(run, copy, dirs_exist_ok=True)
        newest = max(int(path.name) for path in Path(copy, "checkpoints").iterdir())
        opened = open_run(config.get_config(), Path(copy), newest, stack)
        print("step", int(opened.state.step))
        stages = tuple(stage for stage in opened.config.stages if not stage.quantized)
        plain = dataclasses.replace(opened.config, stages=stages)
        made = export.export(Path(copy), plain, opened.state, opened.source.tokenizer)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)


def by_kind(directory: Path) -> None:
    """Prints the share of right tokens: of values and first words, and of all others."""
    model, variables = v4jax.load(str(directory))
    renderer = Renderer(read_tokenizer(f"{directory}/tokenizer.json", ""))
    best = jax.jit(lambda v, ids: jnp.argmax(model.apply(v, ids).logits, -1))
    rng = np.random.default_rng(1)
    for kind, tools in KINDS.items():
        found = np.zeros((2, 2))
        for number in range(EACH):
            names = [tools[int(i)].name for i in rng.permutation(len(tools))[:2]]
            kinds, thinking = ("tell", kind), bool(number % 2)
            talk = draw(rng, True, 2000, kinds=kinds, tools=names, steps=4, thinking=thinking)
            ids, counts = renderer.whole(talk)
            row = np.zeros((1, LENGTH), np.int32)
            ids, counts = ids[:LENGTH], counts[:LENGTH]
            row[0, : ids.size] = ids
            right = np.asarray(best(variables, row))[0, : ids.size - 1] == ids[1:]
            for place, of in enumerate((counts[1:] == VALUE, counts[1:] == 1)):
                found[place] += right[of].sum(), of.sum()
        shares = found[:, 0] / found[:, 1]
        print(f"{kind:8} values {shares[0]:6.1%}  others {shares[1]:6.1%}", flush=True)


def main(arguments):
    run, out = map(Path, arguments)
    exported(run, out)
    by_kind(out)


if __name__ == "__main__":
    main(sys.argv[1:])
