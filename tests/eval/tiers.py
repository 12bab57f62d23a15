"""Two tiers without a model: workers and reviewers that are scripted."""

import hashlib
import json
import re

from tests.eval.targets import Caller, Fake
from tests.eval.tokenizers import of_bytes
from v4jax.eval.extraction import SHEETS

FACTS = {
    "founder": r"It was founded by ([^.]*)\.",
    "dish": r"Its own dish is (\w+),",
    "river": r"The river through it is the (\w+)\.",
    "guild": r"The guild that runs its market is the (\w+)\.",
}


def step(prompt):
    """Which step a prompt asks for."""
    text = prompt.messages[0]["content"]
    if text.startswith("You review"):
        return "review"
    if "First copy out" in text:
        return "extract"
    return "draft" if text.startswith("Do the task from these quotes") else "answer"


def asked_fields(text):
    return re.findall(r"^(\w+): \.\.\.$", text, re.MULTILINE)


def sheet(text):
    """Where the asked place's sheet begins, and the sheet."""
    place = re.search(r"the facts about (\w+)\.", text)[1]
    found = re.search(rf"^{place} is a .*$", text, re.MULTILINE)
    return found.start(), found[0]


def right(text, among):
    """The lines that a perfect model answers, from some text."""
    found = {field: re.search(FACTS[field], among) for field in asked_fields(text)}
    return "\n".join(f"{field}: {each[1]}" for field, each in found.items() if each)


def wrong(text, among):
    return "\n".join(f"{field}: nothing" for field in asked_fields(text))


def extracted(text, **changes):
    start, found = sheet(text)
    quotes = []
    for field in asked_fields(text):
        each = re.search(FACTS[field], found)
        quotes.append({"start": start + each.start(), "text": each[0]} | changes)
    return json.dumps({"quotes": quotes})


class Reader:
    """A chat model that extracts, drafts, answers and calls tools, right wherever it is not told.

    Args:
      good: text -> whether its draft or answer is right. quotes: text -> its quotes as JSON.
    """

    def __init__(self, good=lambda text: True, quotes=extracted, tools=None):
        self._good, self._quotes = good, quotes
        self._tools = tools or Caller()

    def __call__(self, prompt, **options):
        if prompt.tools:
            return self._tools(prompt, **options)
        text, kind = prompt.messages[0]["content"], step(prompt)
        if kind == "extract":
            return self._quotes(text)
        if kind == "review":
            return judged(text)
        among = sheet(text)[1] if kind == "answer" else text
        return right(text, among) if self._good(text) else wrong(text, among)


def judged(text, wording=False):
    """The verdict of a perfect reviewer of documents, or of calls whose last result has the value.

    Args:
      wording: it revises with a text of its own.
    """
    answer = text.split("ANSWER:\n", 1)[1].split("\n\nYour last verdict")[0]
    if "CALLS:\n" in text:
        fine = f'"{answer.strip()}"' in text.split("CALLS:\n")[1].split("\n\nANSWER:")[0]
        truth = ""
    else:
        quotes = text.split("QUOTES:\n")[1].split("\n\nANSWER:")[0]
        truth = right(text, quotes)
        fine = answer == truth
    if fine:
        return json.dumps({"verdict": "accept", "issues": []})
    found = {"verdict": "revise", "issues": ["wrong"]}
    return json.dumps(found | ({"text": truth} if wording and truth else {}))


def place(text):
    return re.search(r"the facts about (\w+)\.", text)[1]


def chat(answer, name="fake"):
    fake = Fake(answer, style="chat")
    fake.name, fake.identity = name, {"model": name, "style": "chat"}
    return fake


def digest():
    """Of sheets at two depths; another one means other samples: raise tier_tasks.VERSION then."""
    found = hashlib.sha256()
    for depth in (None, 0.25):
        sample = SHEETS.make(7, 5, 6001, depth, of_bytes)
        said = [sample.prompt.messages, sample.expected, sample.depth, sample.shared]
        found.update(json.dumps(said).encode())
    return found.hexdigest()
