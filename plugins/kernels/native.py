"""Kernels `native`: the ops of the contract in C++ (see plugins/native), for CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.kernels import Kernels, KernelSpec, StepProgram
from interlace.interfaces.model import LayerCache, Model
from interlace.interfaces.weights import BlockWeight
from interlace.plugins.native import library as native
from interlace.plugins.native.library import Library, NativeUnavailableError
from interlace.plugins.native.linear import WAYS, NativeLinear, block_linear, kept_as
from interlace.plugins.native.program import NativeProgram
from interlace.plugins.native.tape import NotRecordableError, Tape


class NativeKernels(Kernels):
    """Ops run on one team of threads, each row in a fixed order of operations: its bits never depend on the batch."""

    class Options(BaseModel):
        """Options of the native kernels."""

        model_config = ConfigDict(extra="forbid")

        isa: Literal["auto", "avx512", "avx2", "portable"] = Field(
            default="auto", description="Instruction set to use; `auto`: the best this CPU has."
        )

    batch_invariant: ClassVar[frozenset[str]] = frozenset({"silu_mul", "make_linear", "make_block_linear", "make_head"})

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
        if op == "make_block_linear":
            return f"C++ {self._tape.library.isa}, blocks of the file, activations in 8 bits"
        return f"C++ {self._tape.library.isa}"

    def compile_step(
        self, model: Model, layers: list[LayerCache], max_tokens: int, max_outputs: int
    ) -> StepProgram | str:
        try:
            return NativeProgram(self._tape, model, layers, max_tokens, max_outputs)
        except NotRecordableError as error:
            return str(error)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[-1] // 2
        out = self._tape.empty((rows, size), gate_up.dtype)
        self._tape.emit(
            native.SILU_MUL,
            gate_up.dtype,
            rows,
            (size, gate_up.stride(0), out.stride(0)),
            (),
            (self._tape.address(gate_up), self._tape.address(out)),
        )
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
