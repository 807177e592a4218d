"""Kernels `native`: the ops of the contract in C++ (see plugins/native), for CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.kernels import Kernels, KernelSpec, StepProgram
from interlace.interfaces.model import LayerCache, Model
from interlace.interfaces.weights import BlockWeight
from interlace.plugins.native import library as native
from interlace.plugins.native.library import Library, NativeUnavailableError
from interlace.plugins.native.linear import BLOCKS, WAYS, NativeLinear, block_linear, kept_as
from interlace.plugins.native.program import NativeProgram
from interlace.plugins.native.tape import NotRecordableError, Tape

if TYPE_CHECKING:
    from interlace.sampling.distribution import Shape


class NativeKernels(Kernels):
    """Ops run on one team of threads, each row in a fixed order of operations: its bits never depend on the batch."""

    class Options(BaseModel):
        """Options of the native kernels."""

        model_config = ConfigDict(extra="forbid")

        isa: Literal["auto", "avx512", "avx2", "portable"] = Field(
            default="auto", description="Instruction set to use; `auto`: the best this CPU has."
        )
        screen_head: bool = Field(
            default=True,
            description="Find greedy tokens with an 8-bit copy of a head in bf16 or float32 and check them against the "
            "head: the same tokens, for half of the head's time and a quarter to a half more of its memory.",
        )

    batch_invariant: ClassVar[frozenset[str]] = frozenset(
        {
            "rms_norm",
            "add_rms_norm",
            "rope",
            "silu_mul",
            "gelu_mul",
            "scale",
            "embedding",
            "make_block_embedding",
            "make_linear",
            "make_block_linear",
            "make_head",
            "argmax",
            "draw",
        }
    )

    def __init__(self, options: BaseModel, spec: KernelSpec) -> None:
        super().__init__(options, spec)
        self._tape = Tape(Library(torch.get_num_threads(), self.options.isa))

    @classmethod
    def supports(cls, op: str, spec: KernelSpec) -> str | None:
        if torch.device(spec.device).type != "cpu":
            return f"runs on the CPU, not on {spec.device}"
        if spec.dtype not in ("float32", "bfloat16"):
            return f"computes in float32 and bfloat16, not in {spec.dtype}"
        try:
            native.supported_isas()
        except NativeUnavailableError as error:
            return str(error)
        if op in ("make_linear", "make_block_linear", "make_head") and spec.weights not in WAYS:
            return f"keeps linear weights as {', '.join(WAYS)}, not as '{spec.weights}'"
        return None

    def describe(self, op: str) -> str:
        if op == "make_linear":
            return f"C++ {self._tape.library.isa}, weights packed, {self.spec.weights}"
        if op == "make_block_linear" and self.spec.keeps_blocks:
            return f"C++ {self._tape.library.isa}, blocks of the file, activations in 8 bits"
        if op == "make_block_linear":
            return f"C++ {self._tape.library.isa}, blocks decoded while they are packed"
        return f"C++ {self._tape.library.isa}"

    def rounds_inputs(self, op: str) -> bool:
        if self.spec.weights == "int8" or (op == "make_block_linear" and self.spec.keeps_blocks):
            return True
        return self.spec.dtype == "float32" and self.spec.weights in ("bf16", "as-shipped")

    def compile_step(
        self, model: Model, layers: list[LayerCache], max_tokens: int, max_outputs: int
    ) -> StepProgram | str:
        try:
            screens = self.options.screen_head
            return NativeProgram(self._tape, model, layers, max_tokens, max_outputs, screens_head=screens)
        except NotRecordableError as error:
            return str(error)

    # ── Norms and positions ─────────────────────────────────────────────────────────────────────────────────────

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
        x, weight = _dense_last(x), weight.contiguous()
        size = x.shape[-1]
        rows = x if x.dim() == 3 else x.unsqueeze(1)  # [rows, heads, size]
        out = self._tape.empty(rows.shape, x.dtype)
        strides = (rows.stride(0), rows.stride(1), out.stride(0), out.stride(1))
        self._emit(native.RMS_NORM, rows, (size, rows.shape[1], *strides, unit_offset), (eps,), (rows, weight, out))
        return out.view(x.shape)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual, weight = _dense_last(x), _dense_last(residual), weight.contiguous()
        out = self._tape.empty(x.shape, x.dtype)
        integers = (x.shape[-1], x.stride(0), residual.stride(0), out.stride(0), unit_offset)
        self._emit(native.ADD_RMS_NORM, x, integers, (eps,), (x, residual, weight, out))
        return out, residual

    def rope(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, cos_sin = _dense_last(query), _dense_last(key), cos_sin.contiguous()
        turned, turned_key = (self._tape.empty(x.shape, x.dtype) for x in (query, key))
        head_size, rotary = query.shape[2], cos_sin.shape[1]
        strides = (*query.stride()[:2], *key.stride()[:2], turned.stride(0), turned_key.stride(0))
        self._emit(
            native.ROPE,
            query,
            (head_size, rotary, query.shape[1], key.shape[1], *strides, cos_sin.shape[0]),
            (),
            (query, key, turned, turned_key, positions.contiguous(), cos_sin),
        )
        return turned, turned_key

    # ── Values one by one ───────────────────────────────────────────────────────────────────────────────────────

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gate(native.SILU_MUL, gate_up)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gate(native.GELU_MUL, gate_up)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        x = _dense_last(x)
        out = self._tape.empty(x.shape, x.dtype)
        self._emit(native.SCALE, x, (x.shape[1], x.stride(0), out.stride(0)), (factor,), (x, out))
        return out

    # ── Linear layers ───────────────────────────────────────────────────────────────────────────────────────────

    def make_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        return NativeLinear(self._tape, [weight], kept_as(self.spec, weight.dtype), bias)

    def make_block_linear(
        self, parts: Sequence[BlockWeight], bias: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        return block_linear(self._tape, self.spec, parts, bias)

    def make_head(self, weight: torch.Tensor | Sequence[BlockWeight]) -> Callable[[torch.Tensor], torch.Tensor]:
        if isinstance(weight, torch.Tensor):
            run = NativeLinear(self._tape, [weight], kept_as(self.spec, weight.dtype))
        else:
            run = block_linear(self._tape, self.spec, weight, None)
        return lambda hidden: run(hidden, wide=True)

    def _gate(self, code: int, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = _dense_last(gate_up)
        out = self._tape.empty((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
        self._emit(code, gate_up, (out.shape[1], gate_up.stride(0), out.stride(0)), (), (gate_up, out))
        return out

    # ── Rows ────────────────────────────────────────────────────────────────────────────────────────────────────

    def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        token_ids, weight = token_ids.contiguous(), _dense_last(weight)
        out = self._tape.empty((token_ids.shape[0], weight.shape[1]), weight.dtype)
        integers = (weight.shape[1], weight.shape[0], weight.stride(0), out.stride(0))
        self._emit(native.EMBEDDING, out, integers, (), (token_ids, weight, out))
        return out

    def make_block_embedding(self, weight: BlockWeight) -> Callable[[torch.Tensor], torch.Tensor]:
        form = BLOCKS.get(weight.format)
        if form is None:
            return super().make_block_embedding(weight)
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        data = weight.data if weight.data.stride(1) == 1 else weight.data.contiguous()

        def embed(token_ids: torch.Tensor) -> torch.Tensor:
            token_ids = token_ids.contiguous()
            out = self._tape.empty((token_ids.shape[0], weight.shape[1]), dtype)
            integers = (weight.shape[1], weight.shape[0], data.stride(0), out.stride(0), form)
            self._emit(native.BLOCK_EMBEDDING, out, integers, (), (token_ids, data, out))
            return out

        return embed

    def argmax(self, logits: torch.Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        logits = _dense_last(logits)
        rows = logits.shape[0]
        best, peaks = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
        self._emit(native.ARGMAX, logits, (logits.shape[1], logits.stride(0)), (), (logits, best, peaks))
        return best.numpy(), peaks.numpy()

    def draw(
        self, logits: torch.Tensor, rows: list[int], shapes: Sequence[Shape], uniforms: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        logits = _dense_last(logits)
        if logits.shape[1] > native.DRAW_LIMIT:
            return super().draw(logits, rows, shapes, uniforms)
        chosen, cuts = np.array(rows, dtype=np.int64), np.array(shapes, dtype=np.float64)  # cuts [rows, 4]
        uniforms, drawn = np.ascontiguousarray(uniforms), np.empty(len(rows), dtype=np.int64)
        pointers = (logits.data_ptr(), *(array.ctypes.data for array in (chosen, cuts, uniforms, drawn)))
        self._tape.emit(native.DRAW, logits.dtype, len(rows), (logits.shape[1], logits.stride(0)), (), pointers)
        return drawn

    def _emit(
        self,
        code: int,
        rows: torch.Tensor,
        integers: Sequence[int],
        floats: Sequence[float],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """An op over the rows of `rows`, in its type."""
        addresses = [self._tape.address(tensor) for tensor in tensors]
        self._tape.emit(code, rows.dtype, rows.shape[0], integers, floats, addresses)


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if neighbours along the last dimension are not neighbours in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
