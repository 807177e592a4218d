"""Workloads: prompts in tokens, each with the exact number of tokens to generate, from a seed or a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from interlace.errors import InterlaceError


class WorkloadError(InterlaceError):
    """A workload cannot be read, is too small, or does not fit the model."""


class WorkItem(msgspec.Struct, frozen=True):
    """One request. A workload file is a JSON array of these."""

    prompt_token_ids: list[int]
    max_tokens: int
    """How many tokens are generated: exactly."""


class Workload(msgspec.Struct, frozen=True):
    """What is asked of the engine in one run."""

    description: str
    items: list[WorkItem]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(item.prompt_token_ids) for item in self.items)

    @property
    def num_output_tokens(self) -> int:
        return sum(item.max_tokens for item in self.items)


def random_items(
    num_prompts: int, *, input_len: int, output_len: int, vocab_size: int, seed: int, prefix_len: int = 0
) -> list[WorkItem]:
    """Prompts of random token ids: `prefix_len` that all of them share, then `input_len` of their own."""
    draw = random.Random(seed)
    prefix = draw.choices(range(vocab_size), k=prefix_len)
    return [WorkItem(prefix + draw.choices(range(vocab_size), k=input_len), output_len) for _ in range(num_prompts)]


def read_items(path: Path, num_prompts: int | None = None, output_len: int | None = None) -> list[WorkItem]:
    """The first `num_prompts` requests of a workload file (all if None), in its order, so that other engines can be
    given the same work. `output_len` replaces their own. Raises `WorkloadError` naming file, record and cause."""
    try:
        items = msgspec.json.decode(path.read_bytes(), type=list[WorkItem])
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error
    except msgspec.DecodeError as error:
        raise WorkloadError(
            f"{path} is no workload: {error}. Expected a JSON array of "
            '{"prompt_token_ids": [integers], "max_tokens": integer}'
        ) from error
    if num_prompts is not None and num_prompts > len(items):
        raise WorkloadError(f"num_prompts = {num_prompts}: {path} has only {len(items)} requests")
    chosen = items[:num_prompts]
    return chosen if output_len is None else [WorkItem(item.prompt_token_ids, output_len) for item in chosen]


def write_items(path: Path, items: Sequence[WorkItem]) -> None:
    """A workload file that `read_items` reads. Raises `WorkloadError` if it cannot be written."""
    try:
        path.write_bytes(msgspec.json.encode(items))
    except OSError as error:
        raise WorkloadError(f"{path} cannot be written: {error}") from error


def is_sharegpt_file(path: Path) -> bool:
    """Whether a JSON file holds conversations rather than requests; judged by its beginning."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            beginning = file.read(4096)
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error
    return '"prompt_token_ids"' not in beginning and '"conversations"' in beginning


def check_fits(items: Sequence[WorkItem], max_model_len: int, vocab_size: int) -> None:
    """Raise `WorkloadError` naming the first request that could not run with its exact length."""
    if not items:
        raise WorkloadError("the workload has no requests")
    for number, item in enumerate(items):
        total = len(item.prompt_token_ids) + item.max_tokens
        if not item.prompt_token_ids or item.max_tokens < 1:
            raise WorkloadError(f"request {number}: at least one token in and one out are needed")
        if total > max_model_len:
            raise WorkloadError(
                f"request {number}: {len(item.prompt_token_ids)} tokens in and {item.max_tokens} out exceed "
                f"max_model_len = {max_model_len}. Shorten them or raise max_model_len"
            )
        unknown = next((token for token in item.prompt_token_ids if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise WorkloadError(
                f"request {number}: token id {unknown} is outside the vocabulary (0 to {vocab_size - 1}); "
                "was the workload made for another model?"
            )
