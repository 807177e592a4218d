"""Distributions of prompt and answer lengths, written as one word on the command line."""

from __future__ import annotations

import math
import random
import re
from typing import Literal

import msgspec

from interlace.bench.workloads import WorkloadError

_FORMS = "N, LOW-HIGH (uniform), normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA or exponential:MEAN"
_NUMBER = r"(\d+(?:\.\d+)?)"
_PATTERNS = {
    "constant": re.compile(r"(\d+)"),
    "uniform": re.compile(r"(\d+)-(\d+)"),
    "normal": re.compile(rf"normal:{_NUMBER},{_NUMBER}"),
    "lognormal": re.compile(rf"lognormal:{_NUMBER},{_NUMBER}"),
    "exponential": re.compile(rf"exponential:{_NUMBER}"),
}


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of token counts of at least 1."""

    text: str
    """As it was written."""
    kind: Literal["constant", "uniform", "normal", "lognormal", "exponential"]
    numbers: tuple[float, ...]

    def draw(self, draw: random.Random) -> int:
        """One length."""
        first, *more = self.numbers
        if self.kind == "constant":
            return int(first)
        if self.kind == "uniform":
            return draw.randint(int(first), int(more[0]))
        if self.kind == "normal":
            value = draw.gauss(first, more[0])
        elif self.kind == "lognormal":
            value = draw.lognormvariate(math.log(first), more[0])
        else:
            value = draw.expovariate(1 / first)
        return max(1, round(value))


def parse_lengths(text: str) -> Lengths:
    """Read one of the forms above. Raises `WorkloadError` naming them."""
    for kind, pattern in _PATTERNS.items():
        found = pattern.fullmatch(text.strip())
        if found is None:
            continue
        numbers = tuple(float(group) for group in found.groups())
        if numbers[0] < 1 or (kind == "uniform" and numbers[1] < numbers[0]):
            break
        return Lengths(text.strip(), kind, numbers)  # type: ignore[arg-type]
    raise WorkloadError(f"'{text}' is no length: write {_FORMS}, with lengths of at least 1")
