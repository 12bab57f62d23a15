"""Scores of answers, as the benchmarks that they follow define them."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def cleaned(answer: str) -> str:
    """An answer with each control character as a line break, without blanks around it."""
    return _CONTROL.sub("\n", answer).strip()


def share_found(expected, answer: str) -> float:
    """Which share of the expected strings occur in the answer, whatever their case."""
    said = cleaned(answer).lower()
    if not said:
        return 0.0
    return sum(each.lower() in said for each in expected) / len(expected)


def any_found(expected, answer: str) -> float:
    """1 where one of the alternatives occurs in the answer."""
    said = cleaned(answer).lower()
    return float(bool(said) and any(each.lower() in said for each in expected))


def first_line_is(expected: str, answer: str) -> float:
    """1 where the answer's first line is exactly the expected text, blanks around it aside."""
    lines = cleaned(answer).split("\n")
    return float(lines[0].strip() == expected)


def set_f1(found: set[str], expected: set[str]) -> float:
    """F1 of two sets: 1 where both are empty, 0 where they share nothing otherwise."""
    if not found and not expected:
        return 1.0
    both = len(found & expected)
    return 2 * both / (len(found) + len(expected)) if both else 0.0
