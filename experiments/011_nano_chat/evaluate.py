"""How well a checkpoint talks: held-out conversations through the engine, and code as before.

    python experiments/011_nano_chat/evaluate.py NAME=CHECKPOINT ... [--part chat|code] [--share S]
    python experiments/011_nano_chat/evaluate.py --draw

Adds to results.json and draws results.png here. --share 0.1 plays a tenth of the conversations.
"""

import argparse
import collections
import functools
import json
import sys
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "000_nano"))  # its figures of code and needles, and its config
import evaluate as code  # noqa: E402
from play import Parser, play  # noqa: E402

import v4jax  # noqa: E402
from v4jax.datasets.chat_rows import Renderer  # noqa: E402
from v4jax.datasets.config import DataConfig  # noqa: E402
from v4jax.datasets.conversations import COMPUTERS, READERS, TOOLS, draw  # noqa: E402
from v4jax.datasets.source import open_source  # noqa: E402
from v4jax.engine.engine import Engine  # noqa: E402
from v4jax.engine.prefix_cache import PrefixCache  # noqa: E402
from v4jax.files.tokenizer_json import read_tokenizer  # noqa: E402
from v4jax.train import evaluate  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = HERE / "results.json"
ROOM, SLOTS = 6144, 12
CHAINS = {2: 40, 5: 50, 10: 40, 20: 24}  # conversations per length
TARGETS = {"single": 0.95, "chain 5": 0.80, "chain 10": 0.50, "rule": 0.90}


def conversations(share: float) -> dict[str, list]:
    """Held-out conversations of each task; always the same ones."""
    rng = np.random.default_rng(24)
    readers = [tool.name for tool in READERS[:3]]
    computers = [tool.name for tool in COMPUTERS]

    def some(number, **given):
        number = max(1, round(number * share))
        return [draw(rng, True, 12000, thinking=bool(i % 2), **given) for i in range(number)]

    def tools(number):
        """So many tools, the first of them in turn, so that each is asked for as often."""
        names = [tool.name for tool in TOOLS]
        return [
            [names[i % len(names)], *rng.permutation(names)[: rng.integers(3)]]
            for i in range(number)
        ]

    def each(number, **given):
        """As `some`, each with tools of its own."""
        chosen = tools(max(1, round(number * share)))
        return [
            draw(rng, True, 12000, thinking=bool(i % 2), tools=sorted(set(of)), **given)
            for i, of in enumerate(chosen)
        ]

    tasks = {"single": each(180, kinds=("look",), rule="")}
    for steps, number in CHAINS.items():
        tasks[f"chain {steps}"] = some(
            number, kinds=("chain",), steps=steps, tools=readers, rule=""
        )
    tasks["computation 3"] = some(30, kinds=("chain",), steps=3, tools=computers, rule="")
    for rule in ("begin", "end", "word", "secret"):
        kinds = ("tell", "ask", "talk", "ask", "unknown", "ask")
        tasks[f"rule {rule}"] = some(20, kinds=kinds, tools=(), rule=rule)
        tasks[f"rule {rule}"] += each(10, kinds=("look", "tell", "ask"), rule=rule)
    tasks["facts"] = some(
        40, kinds=("tell", "tell", "talk", "ask", "read", "ask"), tools=(), rule=""
    )
    tasks["unknown"] = some(20, kinds=("tell", "unknown"), tools=(), rule="")
    tasks["no tool"] = each(40, kinds=("no_tool",), rule="")
    tasks["retry"] = each(20, kinds=("retry",), rule="")
    tasks["lost"] = each(20, kinds=("lost",), rule="")
    return tasks


def talk(model, params, directory, share, temperature) -> dict:
    """Figures of all tasks, each a share from 0 to 1 with the number that it is of."""
    path = f"{directory}/tokenizer.json"
    renderer, parser = Renderer(read_tokenizer(path, "export the model again")), Parser(path)
    config = model.config
    length = min(ROOM, config.max_position_embeddings)
    engine = Engine(
        model,
        params,
        slots=SLOTS,
        max_length=length,
        draft=None,
        prefix_cache=PrefixCache(memory_bytes=2**30),
    )
    figures, called = {}, collections.Counter()
    with engine:
        for name, drawn in conversations(share).items():
            began = time.perf_counter()
            games = play(engine, renderer, parser, drawn, config.eos_token_id, temperature)
            figures[name] = _figures(name, games, called)
            print(name, figures[name], f"{time.perf_counter() - began:.0f} s", flush=True)
    calls = called["valid"] + called["invalid"]
    figures["valid calls"] = [called["valid"] / max(1, calls), calls]
    rules = [figures[f"rule {rule}"] for rule in ("begin", "end", "word", "secret")]
    total = sum(number for _, number in rules)
    figures["rule"] = [sum(share * number for share, number in rules) / total, total]
    return figures


def _figures(name, games, called):
    said = [one for game in games for one in game.said]
    called.update("valid" if one.valid else "invalid" for one in said if one.valid is not None)
    for one in (one for game in games for one in game.said if not one.exact):
        print("   expected", _short(one.expected), "\n   came    ", _short(one.message))
    if name == "single":
        first = [game.said[0].exact for game in games]
        return [sum(first) / len(first), len(first)]
    if name.startswith("rule"):
        kept = [_kept(name.split()[1], game) for game in games]
        kept = [one for game in kept for one in game]
        return [sum(kept) / len(kept), len(kept)]
    exact = [game.exact for game in games]
    return [sum(exact) / len(exact), len(exact)]


def _short(message):
    return message.call or message.content[:90]


def _kept(rule, game):
    """Of each answer that is no call, whether it keeps the rule."""
    word = game.conversation.messages[0].content.split('"')[1] if rule != "word" else ""
    for one in game.said:
        if one.expected.call is not None:
            continue
        text = one.message.content
        if rule == "begin":
            yield text.startswith(f"{word}\n")
        elif rule == "end":
            yield text.endswith(f"\n{word}")
        elif rule == "word":
            yield len(text.split()) == 1
        elif "may not tell" in one.expected.content:  # the secret was asked for
            yield one.exact


def of_code(model, variables, directory) -> dict:
    """Held-out bits per byte and needles, as 000_nano measures them."""
    tokenizer = v4jax.Tokenizer(directory)
    data = DataConfig("python", tokenizer=str(directory), held_out=code.HELD_OUT)
    source = open_source(data, model.config)
    run = jax.jit(functools.partial(evaluate.sums, model))
    last = jax.jit(functools.partial(code.last_logits, model))
    return {
        "bits_per_byte": {
            str(n): code.bits_per_byte(run, variables, source, n) for n in code.LENGTHS
        },
        "needle_found": {
            str(n): code.needle(last, variables, source, tokenizer, n) for n in code.NEEDLE_LENGTHS
        },
        "first_rows_nats_per_token": code.first_rows(run, variables, source),
    }


def draw_picture(results: dict) -> None:
    """Shares of each task, a bar per checkpoint, with the targets."""
    names = [*next(iter(results.values()))["chat"]]
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    width = 0.8 / len(results)
    for number, (label, result) in enumerate(results.items()):
        shares = [100 * result["chat"].get(name, [0, 0])[0] for name in names]
        places = np.arange(len(names)) + number * width
        axis.bar(places, shares, width, align="edge", label=label)
    for name, target in ({"valid calls": 0.98} | TARGETS).items():
        at = names.index(name)
        axis.plot([at, at + 0.8], [100 * target] * 2, color="black", linewidth=1.5)
    axis.set_xticks(np.arange(len(names)) + 0.4, names, rotation=45, ha="right", fontsize=8)
    axis.set(ylim=(0, 102), ylabel="right, %")
    axis.set_title("Held-out conversations; black: what was asked for")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
    figure.savefig(HERE / "results.png", dpi=110)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=CHECKPOINT")
    parser.add_argument("--part", choices=("chat", "code"))
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--draw", action="store_true")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for checkpoint in given.checkpoints:
        name, directory = checkpoint.split("=", 1)
        model, variables = v4jax.load(directory)
        found = results.setdefault(name, {})
        if given.part != "code":
            found["chat"] = talk(model, variables, directory, given.share, given.temperature)
        if given.part != "chat":
            found["code"] = of_code(model, variables, directory)
            print(name, json.dumps(found["code"]), flush=True)
        if given.share == 1:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if given.draw:
        draw_picture({name: result for name, result in results.items() if "chat" in result})


if __name__ == "__main__":
    main()
