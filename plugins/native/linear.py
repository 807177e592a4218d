"""Linear layers in C++: weights packed once (src/linear_pack.cpp), then one op per product (src/linear.h)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from interlace.plugins.native import library as native
from interlace.plugins.native.tape import Tape

if TYPE_CHECKING:
    from interlace.interfaces.kernels import KernelSpec
    from interlace.interfaces.weights import BlockWeight

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Types of plain weights -> il_format."""

KEPT = {"float32": 0, "bf16": 2, "int8": 3}
"""Ways of keeping plain weights -> il_format."""

BLOCKS = {
    "Q4_0": 10,
    "Q4_1": 11,
    "Q5_0": 12,
    "Q5_1": 13,
    "Q8_0": 14,
    "Q4_K": 20,
    "Q5_K": 21,
    "Q6_K": 22,
}
"""GGUF's block formats that products run in without decoding -> il_format."""


WAYS = ("auto", "as-shipped", *sorted(KEPT))
"""Values of `KernelSpec.weights` that are served."""


def kept_as(spec: KernelSpec, shipped: torch.dtype) -> str:
    """The key of `KEPT` for a plain weight. As shipped: bfloat16 stays, and what bfloat16 does not hold is float32."""
    if spec.weights == "auto":
        return "bf16" if spec.dtype == "bfloat16" else "float32"
    if spec.weights == "as-shipped":
        return "bf16" if shipped == torch.bfloat16 else "float32"
    return spec.weights


def block_linear(tape: Tape, spec: KernelSpec, parts: Sequence[BlockWeight], bias: torch.Tensor | None) -> NativeLinear:
    """A weight in blocks. Where they are kept, formats that no kernel has are decoded into the type of compute."""
    dtype = getattr(torch, spec.dtype) if spec.keeps_blocks else spec.decoded_dtype
    rows = [part if part.format in BLOCKS else part.dequantize(dtype) for part in parts]
    keep = "int8" if spec.weights == "int8" else "bf16" if dtype == torch.bfloat16 else "float32"
    return NativeLinear(tape, rows, keep, bias, decode_blocks=not spec.keeps_blocks)


class _Part(ctypes.Structure):
    """il_part."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


class NativeLinear:
    """A packed weight: x [tokens, in] -> [tokens, out]."""

    def __init__(
        self,
        tape: Tape,
        parts: Sequence[torch.Tensor | BlockWeight],
        keep: str,
        bias: torch.Tensor | None = None,
        *,
        decode_blocks: bool = False,
    ) -> None:
        """`parts`: rows of the weight, one after the other; floating tensors [rows, in] and weights in blocks of a
        format of `BLOCKS`. `keep`: a key of `KEPT`, for the tensors, and for the blocks as well if `decode_blocks`;
        else these stay blocks. None of the parts is kept or changed."""
        self._tape = tape
        self.in_size = parts[0].shape[1]
        self.out_size = sum(part.shape[0] for part in parts)
        data = [part if isinstance(part, torch.Tensor) else part.data for part in parts]
        data = [item if item.stride(-1) == 1 else item.contiguous() for item in data]
        array = (_Part * len(parts))(
            *(
                _Part(_format(part), item.shape[0], item.stride(0) * item.element_size(), item.data_ptr())
                for part, item in zip(parts, data, strict=True)
            )
        )
        kept_bias = None if bias is None else _bias(bias, keep)
        error = ctypes.create_string_buffer(256)
        functions = tape.library.functions
        self.handle: int | None = functions.il_linear_pack(
            tape.library.handle,
            ctypes.addressof(array),
            len(parts),
            self.in_size,
            KEPT[keep],
            decode_blocks,
            None if kept_bias is None else kept_bias.data_ptr(),
            ctypes.addressof(error),
            len(error),
        )
        if self.handle is None:
            raise ValueError(f"a weight [{self.out_size}, {self.in_size}] cannot be packed: {error.value.decode()}")
        weakref.finalize(self, functions.il_linear_free, self.handle)

    @property
    def nbytes(self) -> int:
        """Memory of the packed weight."""
        return int(self._tape.library.functions.il_linear_bytes(self.handle))

    def __call__(self, x: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """x [tokens, in] in float32 or bfloat16 -> [tokens, out] in the type of x, or in float32 if `wide`."""
        if x.stride(1) != 1 and x.numel() > 1:
            x = x.contiguous()
        rows = x.shape[0]
        out = self._tape.empty((rows, self.out_size), torch.float32 if wide else x.dtype)
        self._tape.emit(
            native.LINEAR,
            x.dtype,
            rows,
            (x.stride(0), self.out_size, int(wide)),
            (),
            (self._tape.address(x), self._tape.address(out), self.handle),
        )
        return out


class HeadScreen:
    """An 8-bit copy of a head, to find the largest of its logits with (src/head_screen.h)."""

    def __init__(self, functions: ctypes.CDLL, handle: int) -> None:
        self.handle = handle
        self.copy: int = functions.il_screen_copy(handle)
        """Of the packed copy: a weight like any other."""
        weakref.finalize(self, functions.il_screen_free, handle)

    @classmethod
    def make(cls, library: native.Library, head: native.Op) -> HeadScreen | None:
        """Of the weight of an op, which must outlive it. None if it is no matrix in the type of its activations."""
        handle = library.functions.il_screen_make(library.handle, head.p[2], head.dtype)
        return None if handle is None else cls(library.functions, handle)


def _format(part: Any) -> int:
    return FLOATS[part.dtype] if isinstance(part, torch.Tensor) else BLOCKS[part.format]


def _bias(bias: torch.Tensor, keep: str) -> torch.Tensor:
    """In float32, rounded as the weights are."""
    return bias.to(torch.bfloat16).float().contiguous() if keep == "bf16" else bias.float().contiguous()
