"""Whether text carries a watermark: `python -m interlace_watermark.detect --key SECRET < answers.json`.

Reads a list of token ids, or what `interlace generate --json` prints. The model is not needed, the key is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from interlace_watermark.greenlist import DEFAULT_GAMMA, is_green, seed_of


class Detection(NamedTuple):
    """How many green tokens there are, and how unlikely so many are by chance."""

    num_scored: int
    """Distinct pairs of neighbouring tokens."""
    num_green: int
    z_score: float
    """Standard deviations above what text without the watermark has on average; above 4 there is little doubt."""

    @property
    def p_value(self) -> float:
        """Chance of at least this score without the watermark, by the normal approximation."""
        return math.erfc(self.z_score / math.sqrt(2)) / 2


def detect(token_ids: Sequence[int], key: str, gamma: float = DEFAULT_GAMMA) -> Detection:
    """Score generated tokens with the key and gamma they were generated with.

    A pair that occurs again is not counted again: it says nothing new, and text that repeats itself would otherwise
    score high or low by the luck of a few pairs.
    """
    pairs = sorted(set(itertools.pairwise(token_ids)))
    if not pairs:
        return Detection(0, 0, 0.0)
    previous, tokens = zip(*pairs, strict=True)
    count, green = len(pairs), int(is_green(seed_of(key), previous, tokens, gamma).sum())
    return Detection(count, green, (green - gamma * count) / math.sqrt(count * gamma * (1 - gamma)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: one line per text. Exit code 1 where the input cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m interlace_watermark.detect", description=__doc__)
    parser.add_argument("--key", required=True, help="the secret the text was generated with")
    parser.add_argument("--gamma", type=float, default=DEFAULT_GAMMA, help=f"share of green tokens ({DEFAULT_GAMMA})")
    args = parser.parse_args(arguments)
    try:
        texts = list(_texts(json.load(sys.stdin)))
    except (ValueError, TypeError, KeyError) as error:
        print(f"the input is neither a list of token ids nor the answers of `interlace generate --json`: {error!r}")
        return 1
    for token_ids in texts:
        found = detect(token_ids, args.key, args.gamma)
        print(f"z = {found.z_score:.2f}, p = {found.p_value:.2g}, {found.num_green} of {found.num_scored} green")
    return 0


def _texts(value: list[Any]) -> Iterator[list[int]]:
    if all(isinstance(entry, int) for entry in value):
        yield value
        return
    for answer in value:
        for output in answer["outputs"]:
            yield [int(token) for token in output["token_ids"]]


if __name__ == "__main__":
    sys.exit(main())
