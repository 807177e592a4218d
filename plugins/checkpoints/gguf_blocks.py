"""Values of GGUF's block formats, in torch: bit for bit what the `gguf` library's reference decoders give.

A block holds some neighbouring values of a row as small integers, with what they have in common: a scale, perhaps a
minimum (ggml-common.h and the reference decoders in ggml-quants.c). All of them are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def decode(type_name: str, data: torch.Tensor) -> torch.Tensor:
    """Rows of blocks [rows, bytes of a row] uint8 -> their values [rows, in] in float32. What lies between the steps
    takes more memory than the values: give some rows at a time."""
    import torch

    block_values, block_bytes, decode_blocks = FORMATS[type_name]
    blocks = data.reshape(-1, block_bytes)
    values = torch.empty(len(blocks), block_values, device=data.device)
    decode_blocks(blocks, values)
    return values.view(data.shape[0], -1)


def _half(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """The float16 at byte `first` of each block: [blocks, 1] in float32."""
    import torch

    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[blocks, groups, n] bytes -> [blocks, groups, 2, n]: first all low halves of a group, then all high ones."""
    import torch

    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _q4(blocks: torch.Tensor, out: torch.Tensor, minimum: bool) -> None:
    """Q4_0: scale, 16 bytes of nibbles, offset by 8. Q4_1: scale, minimum, nibbles."""
    halves = out.view(-1, 2, 16)
    packed = blocks[:, 4 if minimum else 2 :]
    halves[:, 0], halves[:, 1] = packed & 15, packed >> 4
    _scale(blocks, out, 8, minimum)


def _q5(blocks: torch.Tensor, out: torch.Tensor, minimum: bool) -> None:
    """As `_q4` with, before the nibbles, a 32-bit mask: the fifth bits; offset by 16."""
    import torch

    first = 4 if minimum else 2
    mask = blocks[:, first : first + 4].unsqueeze(-1)  # [blocks, 4, 1]
    fifth = ((mask >> torch.arange(8, dtype=torch.uint8, device=blocks.device)) & 1) << 4  # [blocks, 4, 8]
    packed = blocks[:, None, first + 4 :]
    out.copy_(_nibbles(packed).view(-1, 32) | fifth.view(-1, 32))
    _scale(blocks, out, 16, minimum)


def _scale(blocks: torch.Tensor, out: torch.Tensor, offset: int, minimum: bool) -> None:
    if minimum:
        out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))
    else:
        out.sub_(offset).mul_(_half(blocks, 0))


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """Scale, then 32 signed bytes."""
    import torch

    out.copy_(blocks.view(torch.int8)[:, 2:])
    out.mul_(_half(blocks, 0))


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of the 8 groups of 32 values of a Q4_K or Q5_K block, each [blocks, 8, 1]: two float16, times
    6-bit numbers. Of the 12 bytes that hold these, the first four are the lower scales and the next four the lower
    minima, with the two highest bits of the upper ones on top; the rest are the low nibbles of the upper ones."""
    import torch

    low, middle, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1)
    minima = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=1)
    return (_half(blocks, 0) * scales).unsqueeze(-1), (_half(blocks, 2) * minima).unsqueeze(-1)


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """256 values: `_k_scales`, then nibbles, 32 bytes for each two groups."""
    scales, minima = _k_scales(blocks)
    groups = out.view(-1, 8, 32)
    groups.copy_(_nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32))
    groups.mul_(scales).sub_(minima)


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """As `_q4_k` with, before the nibbles, 32 bytes of fifth bits: bit g of byte j belongs to value j of group g."""
    import torch

    scales, minima = _k_scales(blocks)
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(1, 8, 1)
    fifth = ((blocks[:, None, 16:48] >> bits) & 1) << 4  # [blocks, 8, 32]
    groups = out.view(-1, 8, 32)
    groups.copy_(_nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32) | fifth)
    groups.mul_(scales).sub_(minima)


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """256 values in 16 groups: 128 bytes of low nibbles, 64 bytes of two high bits each, 16 signed scales of the
    groups, the scale of the block; offset by 32."""
    import torch

    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(1, 1, 4, 1)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3) << 4  # [blocks, 2, 4, 32]
    scales = _half(blocks, 208) * blocks.view(torch.int8)[:, 192:208]
    out.copy_((low | high).view(-1, 256))
    out.sub_(32)
    out.view(-1, 16, 16).mul_(scales.unsqueeze(-1))


FORMATS: dict[str, tuple[int, int, Callable[[torch.Tensor, torch.Tensor], None]]] = {
    "Q4_0": (32, 18, partial(_q4, minimum=False)),
    "Q4_1": (32, 20, partial(_q4, minimum=True)),
    "Q5_0": (32, 22, partial(_q5, minimum=False)),
    "Q5_1": (32, 24, partial(_q5, minimum=True)),
    "Q8_0": (32, 34, _q8_0),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
"""Format to (values of a block, bytes of a block, blocks [blocks, bytes] -> out [blocks, values])."""
