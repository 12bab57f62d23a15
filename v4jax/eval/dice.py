"""Seeded draws that are the same on every Python: bytes of a hash, not a library's generator."""

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_HEX, _DIGITS = "0123456789abcdef", "0123456789"
_LOWER = "abcdefghijklmnopqrstuvwxyz"


class Dice:
    """Draws that depend on the given names alone, such as a task, a seed and a sample's number."""

    def __init__(self, *names):
        self._key = hashlib.sha256(json.dumps(names).encode()).digest()
        self._block, self._bytes, self._at = 0, b"", 0

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1, each as likely."""
        bits = (limit - 1).bit_length()
        while True:
            found = int.from_bytes(self._take((bits + 7) // 8), "little") & ((1 << bits) - 1)
            if found < limit:
                return found

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, of: Sequence[T]) -> T:
        return of[self.below(len(of))]

    def shuffled(self, of: Sequence[T]) -> list[T]:
        return self.sample(of, len(of))

    def sample(self, of: Sequence[T], count: int) -> list[T]:
        """So many different places of a sequence, in random order."""
        left = list(of)
        for i in range(count):
            j = i + self.below(len(left) - i)
            left[i], left[j] = left[j], left[i]
        return left[:count]

    def digits(self, count: int) -> str:
        """A number of so many digits, the first not 0."""
        return self.choice(_DIGITS[1:]) + "".join(self.choice(_DIGITS) for _ in range(count - 1))

    def hex(self, count: int) -> str:
        return "".join(self.choice(_HEX) for _ in range(count))

    def letters(self, count: int) -> str:
        return "".join(self.choice(_LOWER) for _ in range(count))

    def uuid(self) -> str:
        """32 random digits in the form of a UUID."""
        text = self.hex(32)
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))

    def _take(self, count):
        while self._at + count > len(self._bytes):
            block = hashlib.sha256(self._key + self._block.to_bytes(8, "little")).digest()
            self._bytes = self._bytes[self._at :] + block
            self._block, self._at = self._block + 1, 0
        taken = self._bytes[self._at : self._at + count]
        self._at += count
        return taken
