"""Rotary position embedding: tables for every scaling in use, computed once from `max_model_len`.

Sources: RoFormer (arXiv 2104.09864); linear, "position interpolation" (2306.15595); dynamic NTK (the formula of
transformers); YaRN (2309.00071); Llama 3.1's published rule; LongRoPE (2402.13753).

`default`, `linear`, `yarn` and `llama3` equal transformers for every length. `dynamic` and `longrope` depend on the
length of the sequence there, so that keys cached earlier and new ones disagree once it grows past the trained length;
here the factor is fixed from `max_model_len`, as if every sequence were that long. So they equal transformers for
sequences of `max_model_len` tokens, and also whenever both lengths lie within the trained one; `longrope` also whenever
both lie beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from interlace.errors import CheckpointError, did_you_mean
from interlace.interfaces.model import BuildContext


class RotaryEmbedding:
    """Rotates queries and keys by their positions. One instance serves all layers with the same parameters."""

    def __init__(
        self, build: BuildContext, parameters: Mapping[str, Any], head_size: int, max_position_embeddings: int
    ) -> None:
        table = rope_table(parameters, head_size, max_position_embeddings, build.max_model_len)
        self._rope = build.kernels.rope
        self.cos_sin = table.to(build.device)
        """[max_model_len, rotary] float32: cosines, then sines."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [tokens, heads, head_size], key [tokens, kv_heads, head_size], positions [tokens]."""
        return self._rope(query, key, positions, self.cos_sin)


def rope_table(
    parameters: Mapping[str, Any], head_size: int, max_position_embeddings: int, max_model_len: int
) -> torch.Tensor:
    """Cosines, then sines: [max_model_len, rotary] in float32, `rotary` channels of each head being rotated.

    `parameters` are rope parameters in Hugging Face names. Raises `CheckpointError` for an unknown `rope_type` or a
    missing key."""
    rope_type = str(parameters.get("rope_type", "default"))
    rule = _RULES.get(rope_type)
    if rule is None:
        raise CheckpointError(
            f"rope_type = '{rope_type}' is not supported; known: {', '.join(_RULES)}.{did_you_mean(rope_type, _RULES)}"
        )
    rotary = int(head_size * float(parameters.get("partial_rotary_factor", 1.0)))
    trained = int(parameters.get("original_max_position_embeddings") or max_position_embeddings)
    case = _Case(
        parameters,
        rotary,
        float(parameters.get("rope_theta", 10000.0)),
        max_position_embeddings,
        trained,
        max_model_len,
    )
    try:
        frequencies, magnitude = rule(case)  # [rotary / 2]
    except KeyError as error:
        raise CheckpointError(f"the rope parameters of rope_type '{rope_type}' lack {error}") from error
    positions = torch.arange(max_model_len, dtype=torch.float32)
    angles = positions.unsqueeze(1) * frequencies  # [max_model_len, rotary / 2]
    return torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), dim=-1)


class _Case(NamedTuple):
    """What a scaling rule may look at."""

    parameters: Mapping[str, Any]
    rotary: int
    theta: float
    max_position_embeddings: int
    trained_length: int
    max_model_len: int


def _powers(theta: float, rotary: int) -> torch.Tensor:
    """theta ** (2 i / rotary): the wavelength of each channel pair over 2 pi."""
    return torch.pow(theta, torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)  # [rotary / 2]


def _default(case: _Case) -> tuple[torch.Tensor, float]:
    return 1.0 / _powers(case.theta, case.rotary), 1.0


def _linear(case: _Case) -> tuple[torch.Tensor, float]:
    return 1.0 / _powers(case.theta, case.rotary) / float(case.parameters["factor"]), 1.0


def _dynamic(case: _Case) -> tuple[torch.Tensor, float]:
    factor = float(case.parameters["factor"])
    length = max(case.max_model_len, case.max_position_embeddings)
    stretch = factor * length / case.max_position_embeddings - (factor - 1.0)
    theta = case.theta * stretch ** (case.rotary / (case.rotary - 2))
    return 1.0 / _powers(theta, case.rotary), 1.0


def _yarn(case: _Case) -> tuple[torch.Tensor, float]:
    """Channels that turn often within the trained length keep their frequency, slow ones are interpolated, and
    those between are blended."""
    given = case.parameters
    factor = float(given.get("factor") or case.max_position_embeddings / case.trained_length)

    def channel(turns: float) -> float:
        """Channel pair that makes this many turns within the trained length."""
        return case.rotary * math.log(case.trained_length / (turns * 2 * math.pi)) / (2 * math.log(case.theta))

    low, high = channel(float(given.get("beta_fast") or 32)), channel(float(given.get("beta_slow") or 1))
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, case.rotary - 1)
    span = (high - low) or 0.001
    kept = 1 - ((torch.arange(case.rotary // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    powers = _powers(case.theta, case.rotary)
    frequencies = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    return frequencies, _yarn_magnitude(given, factor)


def _yarn_magnitude(given: Mapping[str, Any], factor: float) -> float:
    """Sharpens attention over long contexts (`attention_factor`, given or inferred)."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return magnitude(given["mscale"]) / magnitude(given["mscale_all_dim"])
    return magnitude(1.0)


def _longrope(case: _Case) -> tuple[torch.Tensor, float]:
    given = case.parameters
    is_long = case.max_model_len > case.trained_length
    stretch = torch.tensor(given["long_factor" if is_long else "short_factor"], dtype=torch.float32)
    magnitude = given.get("attention_factor")
    if magnitude is None:
        factor = float(given.get("factor") or case.max_position_embeddings / case.trained_length)
        magnitude = math.sqrt(1 + math.log(factor) / math.log(case.trained_length)) if factor > 1 else 1.0
    return 1.0 / (stretch * _powers(case.theta, case.rotary)), float(magnitude)


def _llama3(case: _Case) -> tuple[torch.Tensor, float]:
    """Short wavelengths stay, long ones are divided by `factor`, those between are blended."""
    factor = float(case.parameters["factor"])
    low, high = float(case.parameters["low_freq_factor"]), float(case.parameters["high_freq_factor"])
    frequencies = 1.0 / _powers(case.theta, case.rotary)
    wavelengths = 2 * math.pi / frequencies
    kept = (case.trained_length / wavelengths - low) / (high - low)  # share of the unscaled frequency
    blended = (1 - kept) * frequencies / factor + kept * frequencies
    scaled = torch.where(wavelengths > case.trained_length / low, frequencies / factor, blended)
    return torch.where(wavelengths < case.trained_length / high, frequencies, scaled), 1.0


_RULES: Mapping[str, Callable[[_Case], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
