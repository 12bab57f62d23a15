"""What a reviewer says of a draft: {verdict: accept | revise | redo, issues, text?}."""

import dataclasses
from typing import Any

from v4jax.eval.json_answer import read_object

KINDS = ("accept", "revise", "redo")
INVALID = "invalid"  # no verdict could be read
ISSUES, LONGEST = 4, 200  # issues that are passed on, and characters of one
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "verdict": {"enum": list(KINDS)},
        "issues": {
            "type": "array",
            "maxItems": ISSUES,
            "items": {"type": "string", "maxLength": LONGEST},
        },
        "text": {"type": "string"},
    },
    "required": ["verdict", "issues"],
    "additionalProperties": False,
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A reviewer's verdict.

    Attributes:
      kind: one of `KINDS`, or `INVALID`.
      issues: what is wrong, for the worker; with `INVALID`, what is wrong with the verdict.
      text: the right answer, where the reviewer gives it with "revise"; None: it does not.
    """

    kind: str
    issues: tuple[str, ...] = ()
    text: str | None = None

    def fields(self) -> dict[str, Any]:
        """For the ledger."""
        return {"verdict": self.kind, "issues": list(self.issues)}


def read(answer: str) -> Verdict:
    """The verdict that an answer is, `INVALID` with its reason where it is none."""
    found, problem = read_object(answer)
    if found is None:
        return Verdict(INVALID, (problem,))
    kind, issues, text = found.get("verdict"), found.get("issues", []), found.get("text")
    if kind not in KINDS:
        return Verdict(INVALID, (f'"verdict" is none of {", ".join(KINDS)}',))
    if not isinstance(issues, list) or not all(isinstance(each, str) for each in issues):
        return Verdict(INVALID, ('"issues" is no list of texts',))
    if text is not None and not isinstance(text, str):
        return Verdict(INVALID, ('"text" is no text',))
    issues = tuple(short for each in issues[:ISSUES] if (short := " ".join(each.split())[:LONGEST]))
    # An empty text is none: the answer would be empty.
    return Verdict(kind, issues, text if kind == "revise" and (text or "").strip() else None)
