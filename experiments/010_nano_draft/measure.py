"""How fast nano decodes one request with each draft, and how often drafts are accepted, by domain.

    python experiments/010_nano_draft/measure.py [RUN] [--draw]

RUN has a trained DSpark draft (config.py); without one plain decoding and the MTP block are
measured. Prompts are held-out documents, what follows them is nano's own text. All engines take
turns on each prompt. It writes measured.json and speed.png; --draw makes the picture alone.
"""

import itertools
import json
import random
import sys
from pathlib import Path

import answers
import numpy as np

import v4jax

HERE = Path(__file__).parent
PROMPTS, PROMPT, NEW = 8, 96, 128
TEMPERATURES = (0.0, 1.0)
MTP = (1, 2, 3)


def engines(run):
    """By name; one slot each."""
    nano = v4jax.load("nano")
    wanted = [("plain", nano, None, None)]
    wanted += [(f"MTP, {count}", nano, "mtp", count) for count in MTP]
    if run is not None:
        wanted.append(("DSpark, 5", v4jax.load(Path(run) / "model"), "dspark", None))
    options = {"slots": 1, "max_length": PROMPT + NEW, "programs": HERE / "runs" / "programs"}
    made = {}
    for name, (model, params), draft, count in wanted:
        made[name] = v4jax.Engine(model, params, draft=draft, draft_tokens=count, **options)
    return made


def measure(run):
    """Writes what is measured after every prompt."""
    made, lines = engines(run), []
    prompts = {
        domain: answers.prompts(domain, True, PROMPTS, PROMPT, random.Random(1))
        for domain in answers.DOMAINS
    }
    for engine in made.values():  # each width of a DSpark draft is tried once first
        engine.generate(prompts["code"][:1], max_new_tokens=16)
    for number in range(PROMPTS):
        for domain, temperature in itertools.product(answers.DOMAINS, TEMPERATURES):
            options = {"temperature": temperature, "seed": number, "max_new_tokens": NEW}
            for name, engine in made.items():
                line = one(engine, prompts[domain][number], options)
                lines.append(line | {"draft": name, "domain": domain})
        rows = "\n".join(f"  {json.dumps(row)}," for row in summary(lines))[:-1]
        (HERE / "measured.json").write_text(f"[\n{rows}\n]\n")


def one(engine, prompt, options):
    """A request's speed, and of each round how many drafts were verified and accepted."""
    loop, rounds = engine._loop, []
    told = loop._verified

    def verified(job, limit, count):
        rounds.append((int(limit), int(count) - 1))
        told(job, limit, count)

    loop._verified = verified
    before = loop.counts["rounds"]
    speed = engine.generate([prompt], **options).tokens_per_second
    del loop._verified
    return {
        "temperature": options["temperature"],
        "tokens_per_second": round(speed, 1),
        "rounds": loop.counts["rounds"] - before,
        "verified": rounds,
    }


def acceptance(rounds):
    """By place: the share of drafts that were accepted, of those verified behind accepted ones."""
    shares = []
    for place in range(max((limit for limit, _ in rounds), default=0)):
        reached = [count > place for limit, count in rounds if limit > place and count >= place]
        shares.append(round(float(np.mean(reached)), 3) if reached else 0.0)
    return shares


def summary(lines):
    """A row for each domain, temperature and draft, in the order measured."""
    groups = {}
    for line in lines:
        groups.setdefault((line["domain"], line["temperature"], line["draft"]), []).append(line)
    rows = []
    for (domain, temperature, draft), found in groups.items():
        speeds = [x["tokens_per_second"] for x in found]
        plain = [x["tokens_per_second"] for x in groups[domain, temperature, "plain"]]
        rows.append(
            {
                "domain": domain,
                "temperature": temperature,
                "draft": draft,
                "acceptance": acceptance([each for x in found for each in x["verified"]]),
                "tokens_per_round": round(
                    (NEW - 1) * len(found) / sum(x["rounds"] for x in found), 3
                ),
                "tokens_per_second": np.percentile(speeds, (10, 50, 90)).round(1).tolist(),
                "prompts": len(found),
                "times_plain": round(float(np.median(np.divide(speeds, plain))), 3),
            }
        )
    return rows


def draw(rows):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["draft"] for row in rows))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharey="row", layout="constrained")
    for column, domain in zip(axes.T, answers.DOMAINS, strict=True):
        for shift, temperature in zip((-0.18, 0.18), TEMPERATURES, strict=True):
            here = [r for r in rows if (r["domain"], r["temperature"]) == (domain, temperature)]
            low, mid, high = np.array([row["tokens_per_second"] for row in here]).T
            at = np.arange(len(here)) + shift
            label = f"temperature {temperature:g}"
            column[0].bar(at, mid, 0.34, yerr=(mid - low, high - mid), capsize=3, label=label)
            for row in here[1:]:
                if row["draft"] in (names[-1], names[-2]):
                    dash = "-" if temperature == 0 else "--"
                    places = np.arange(1, len(row["acceptance"]) + 1)
                    name = f"{row['draft']}, {label}"
                    column[1].plot(places, row["acceptance"], "o" + dash, label=name)
        column[0].set(title=f"{domain}: speed of one request", xticks=range(len(names)))
        column[0].set_xticklabels(names)
        column[1].set(title=f"{domain}: drafts accepted", xlabel="place of the draft", ylim=(0, 1))
    axes[0, 0].set_ylabel("tokens per second\n(median; 10 to 90 % of prompts)")
    axes[1, 0].set_ylabel("probability, if those\nbefore it are accepted")
    for row in axes:
        row[1].legend(fontsize=8)
    figure.savefig(HERE / "speed.png", dpi=110)


def main(arguments):
    if "--draw" not in arguments:
        measure(arguments[0] if arguments else None)
    rows = json.loads((HERE / "measured.json").read_text())
    for row in rows:
        print(*row.values(), sep="  ")
    draw(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
