"""Quotes of a text, checked against it without a model: what is not in it, word for word, goes."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from v4jax.eval.json_answer import read_object

MOST, LONGEST, TOTAL = 8, 300, 1000  # quotes; characters of one, and of all together
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "quotes": {
            "type": "array",
            "maxItems": MOST,
            "items": {
                "type": "object",
                "properties": {
                    "start": {"type": "integer"},
                    "text": {"type": "string", "maxLength": LONGEST},
                },
                "required": ["start", "text"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["quotes"],
    "additionalProperties": False,
}


@dataclasses.dataclass(frozen=True)
class Quote:
    """A piece of a text and the number of its first character there."""

    start: int
    text: str


@dataclasses.dataclass(frozen=True)
class Checked:
    """Quotes that are in the text, at their true places, and what became of the others.

    Attributes:
      kept: those a reviewer may see. said: how many there were.
      exact: kept ones whose place was right as it was said; of the others it was corrected.
      invented: not in the text. refused: no quote, empty, too long, or beyond `TOTAL`.
      problem: why no quote could be read at all, or "".
    """

    kept: tuple[Quote, ...] = ()
    said: int = 0
    exact: int = 0
    invented: int = 0
    refused: int = 0
    problem: str = ""

    @property
    def share(self) -> float:
        """Which share of the quotes is in the text; 0 of none."""
        return len(self.kept) / self.said if self.said else 0.0

    def counts(self) -> dict[str, Any]:
        """For the ledger."""
        fields = dataclasses.asdict(self)
        return fields | {"kept": [dataclasses.asdict(each) for each in self.kept]}


def read(source: str, answer: str) -> Checked:
    """The quotes of an answer, {"quotes": [{"start", "text"}]}, checked against the source."""
    found, problem = read_object(answer)
    if found is None:
        return Checked(problem=problem)
    listed = found.get("quotes")
    if not isinstance(listed, list):
        return Checked(problem='there is no list "quotes"')
    return check(source, listed)


def check(source: str, listed: Sequence[Any]) -> Checked:
    """Quotes as JSON has them, checked: `text` has to be in the source to the letter.

    A quote whose place is wrong is kept at the nearest place where the source has it. Blanks around
    it are not part of it. One that was kept before counts as refused.
    """
    kept: dict[Quote, None] = {}
    exact = invented = refused = total = 0
    for each in listed:
        text = each.get("text") if isinstance(each, dict) else None
        text = text.strip() if isinstance(text, str) else ""
        if not text or len(text) > LONGEST:
            refused += 1
            continue
        said = _whole(each.get("start"))
        place = _nearest(source, text, said)
        if place is None:
            invented += 1
            continue
        quote = Quote(place, text)
        if quote in kept or len(kept) == MOST or total + len(text) > TOTAL:
            refused += 1
            continue
        kept[quote], total = None, total + len(text)
        exact += place == said
    return Checked(tuple(kept), len(listed), exact, invented, refused)


def shown(quotes: Sequence[Quote]) -> str:
    """Quotes as a reviewer sees them, a line each."""
    lines = [f"[{each.start}] {json.dumps(each.text, ensure_ascii=False)}" for each in quotes]
    return "\n".join(lines) or "(none)"


def _whole(value):
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _nearest(source, text, said):
    """The place of a text that is nearest to where it is said to be; None: nowhere."""
    if said is None:
        place = source.find(text)
        return None if place < 0 else place
    if said >= 0 and source.startswith(text, min(said, len(source))):
        return said
    said = min(max(said, 0), len(source))
    before, behind = source.rfind(text, 0, said + len(text)), source.find(text, said)
    places = [place for place in (before, behind) if place >= 0]
    return min(places, key=lambda place: (abs(place - said), place), default=None)
