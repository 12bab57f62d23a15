"""One fact in a long text, asked for at the end: does the model find it, by length and depth?"""

from v4jax.eval import haystack, words
from v4jax.eval.dice import Dice
from v4jax.eval.fit import most_steps
from v4jax.eval.sample import Measure, Sample, Task, asked
from v4jax.eval.scores import first_line_is, share_found

BUDGET = 48
FACT_BUDGET = 8
INTRODUCTION = (
    "A special magic number is hidden in the following text. Memorize it: you will be asked for it "
    "afterwards.\n\n"
)


def task(style: str) -> Task:
    """The needle in the form that a model can answer.

    Args:
      style: "facts": a line of facts in code, as nano was trained on, else prose.
    """
    if style == "facts":
        return Task("needle", _fact, _score_fact, 1 / len(words.CODE_WORDS), depths=True)
    return Task("needle", _number, _score_number, depths=True)


def _fact(seed: int, number: int, length: int, depth: float | None, measure: Measure) -> Sample:
    dice = Dice("needle", "facts", seed, length, number)
    key, value = dice.sample(words.CODE_WORDS, 2)
    # One haystack for all samples of a length: what lies before the needle is read once.
    units = haystack.code(seed)
    depth = haystack.even_depth(dice) if depth is None else depth
    fact = f"# remember: {key} = {value}\n"

    def build(steps):
        text = haystack.hidden(units, steps, [(depth, fact)])
        return asked(f"{text}# recall: {key} =", continues=True)

    steps = most_steps(build, measure, length, FACT_BUDGET, "needle")
    prompt = build(steps)
    shared = prompt.text.index(fact)
    return Sample(prompt, [value], FACT_BUDGET, depth, ("\n",), {"key": key}, shared)


def _number(seed: int, number: int, length: int, depth: float | None, measure: Measure) -> Sample:
    dice = Dice("needle", "prose", seed, length, number)
    key = f"{dice.choice(words.ADJECTIVES)} {dice.choice(words.NOUNS)}"
    value, units = dice.digits(7), haystack.essay(seed)
    depth = haystack.even_depth(dice) if depth is None else depth
    fact = f"The special magic number for {key} is: {value}.\n"

    def build(steps):
        text = haystack.hidden(units, steps, [(depth, fact)])
        question = f"What is the special magic number for {key} in the text above?"
        prefix = f"The special magic number for {key} in the text is"
        return asked(f"{INTRODUCTION}{text}\n\n{question}", prefix)

    steps = most_steps(build, measure, length, BUDGET, "needle")
    prompt = build(steps)
    shared = prompt.text.index(fact)
    return Sample(prompt, [value], BUDGET, depth, (), {"key": key}, shared)


def _score_fact(sample: Sample, answer: str) -> dict[str, float]:
    return {"score": first_line_is(sample.expected[0], answer)}


def _score_number(sample: Sample, answer: str) -> dict[str, float]:
    return {"score": share_found(sample.expected, answer)}
