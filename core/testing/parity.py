"""Exactness against transformers: greedy references, and the rule by which a difference may be a tie."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import msgspec

TIE = 1e-3
"""Where the reference's two best logits lie this close, float32 rounding may choose either."""


class Reference(msgspec.Struct, frozen=True):
    """Greedy output of the reference for one prompt."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    gaps: list[float]
    """Per output token: the best logit less the second best."""


class Agreement(enum.Enum):
    """How an output compares with its reference."""

    EQUAL = "equal"
    TIE = "tie"
    """They part at a position where the reference itself was within `TIE`."""
    DIFFERENT = "different"


def agreement(reference: Reference, token_ids: Sequence[int]) -> tuple[Agreement, int]:
    """(agreement, position of the first difference or the length compared)."""
    expected = reference.token_ids
    for position, (ours, theirs) in enumerate(zip(token_ids, expected, strict=False)):
        if ours != theirs:
            return (Agreement.TIE if reference.gaps[position] <= TIE else Agreement.DIFFERENT), position
    same_length = len(token_ids) == len(expected)
    return (Agreement.EQUAL if same_length else Agreement.DIFFERENT), min(len(token_ids), len(expected))


def transformers_greedy(
    model: Any, prompt_token_ids: list[int], max_tokens: int, eos_token_ids: Sequence[int] = ()
) -> Reference:
    """Greedy decoding of one prompt alone with a transformers causal language model, one token at a time."""
    import torch

    token_ids: list[int] = []
    gaps: list[float] = []
    given, cache = torch.tensor([prompt_token_ids]), None
    with torch.inference_mode():
        while len(token_ids) < max_tokens:
            output = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            best = output.logits[0, -1].float().topk(2)
            token = int(best.indices[0])
            token_ids.append(token)
            gaps.append(round(float(best.values[0] - best.values[1]), 6))
            if token in eos_token_ids:
                break
            given = torch.tensor([[token]])
    return Reference(prompt_token_ids, token_ids, gaps)


def load_transformers(path: str, **options: Any) -> Any:
    """The reference model of a GGUF file or a model directory, in float32 with plain attention."""
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = Path(path)
    if where.is_file():
        options["gguf_file"], where = where.name, where.parent
    return AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
