"""A model's step as one native call: the recorded ops of forward, gather of the output rows, head, and argmax."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import torch

from interlace.interfaces.kernels import Peaks, StepProgram
from interlace.interfaces.model import ForwardContext, LayerCache, Model
from interlace.plugins.native.library import ARGMAX, COPY_ROWS, LINEAR, OP_NAMES, SCREENED_ARGMAX, Op
from interlace.plugins.native.linear import HeadScreen
from interlace.plugins.native.step import StepBuffers
from interlace.plugins.native.tape import NotRecordableError, Recording, Tape
from interlace.worker.batch import ForwardBatch


def name_of(op: Op) -> str:
    """What a profile calls an op."""
    return "gated linear" if op.code == LINEAR and op.i[3] else OP_NAMES[op.code]


def _find_head(ops: Sequence[Op]) -> Op | None:
    """The op that makes the logits of a step, if the argmax that ends it sees exactly these."""
    head, argmax = ops[-2:]
    return head if head.code == LINEAR and argmax.code == ARGMAX and head.p[1] == argmax.p[0] else None


def _screened(ops: Sequence[Op], screen: HeadScreen) -> list[Op]:
    """The ops of a step that gives nothing but the argmax."""
    head, argmax = ops[-2:]
    rough, checked = Op.from_buffer_copy(head), Op.from_buffer_copy(argmax)
    rough.p[2] = screen.copy
    checked.code, checked.dtype, checked.i[2] = SCREENED_ARGMAX, head.dtype, head.i[0]
    checked.p[3], checked.p[4] = head.p[0], screen.handle
    return [*ops[:-2], rough, checked]


class NativeProgram(StepProgram):
    """Ops recorded at the largest number of rows, replayed for every batch."""

    def __init__(
        self,
        tape: Tape,
        model: Model,
        layers: list[LayerCache],
        max_tokens: int,
        max_outputs: int,
        *,
        screens_head: bool = True,
    ) -> None:
        """Record `model`; `screens_head`: greedy tokens are found as src/head_screen.h says, if the head allows it.
        Raises `NotRecordableError`."""
        for layer in layers:
            if getattr(layer.backend, "library", None) is None:
                raise NotRecordableError(
                    f"attention runs on {type(layer.backend).__name__}, outside the native kernels"
                )
        if max_outputs == max_tokens:
            max_outputs += 1  # rows of a recording must tell tokens from outputs
        self._library = tape.library
        self._model = model  # owns the weights that the ops point to
        self._caches = [layer.cache for layer in layers]
        self._steps = StepBuffers(max_tokens, max_outputs)
        num_groups = 1 + max((layer.group for layer in layers), default=0)
        token_ids = torch.zeros(max_tokens, dtype=torch.int64)
        positions = torch.zeros(max_tokens, dtype=torch.int64)
        context = ForwardContext(layers, [Recording(tape, group) for group in range(num_groups)])
        with tape.recording(max_tokens, max_outputs, [token_ids, positions]) as ops:
            self._hidden = model.forward(token_ids, positions, context).hidden
            self._head = len(ops)  # from here on, ops work on the output rows
            chosen = tape.empty((max_outputs, *self._hidden.shape[1:]), self._hidden.dtype)
            size, row = self._hidden.shape[1], self._hidden.stride(0)
            copied = (self._hidden.data_ptr(), chosen.data_ptr())
            tape.emit(COPY_ROWS, chosen.dtype, max_outputs, (size, row, chosen.stride(0)), (), copied)
            self._logits = model.logits(chosen)
            best, values = tape.empty((max_outputs,), torch.int64), tape.empty((max_outputs,), torch.float32)
            logits = self._logits
            addresses = (logits.data_ptr(), best.data_ptr(), values.data_ptr())
            tape.emit(ARGMAX, logits.dtype, max_outputs, (logits.shape[1], logits.stride(0)), (), addresses)
        if self._logits.shape[0] != max_outputs or self._logits.dtype != torch.float32:
            raise NotRecordableError("the model's logits are not one row of float32 per output")
        self._peaks = best.numpy(), values.numpy()
        self._num_outputs = 0  # of the last run
        self._ops = (Op * len(ops))(*ops)
        head = _find_head(ops) if screens_head else None
        self._screen = HeadScreen.make(self._library, head) if head is not None else None
        self._greedy_ops = (Op * len(ops))(*_screened(ops, self._screen)) if self._screen else None
        self._last_ops = self._ops
        self._one = (Op * 1)()

    def describe(self) -> str:
        what = f"{len(self._ops)} native ops in one call, {self._library.threads} thread(s), {self._library.isa}"
        return f"{what}, greedy tokens by an 8-bit copy of the head, checked" if self._greedy_ops else what

    def run(self, batch: ForwardBatch, outputs: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self._run(self._ops, batch, outputs)
        return self._hidden[: batch.num_tokens], self._logits[: len(outputs)]

    def run_greedy(self, batch: ForwardBatch, outputs: Sequence[int]) -> tuple[torch.Tensor, Peaks] | None:
        if self._greedy_ops is None:
            return None
        self._run(self._greedy_ops, batch, outputs)
        return self._hidden[: batch.num_tokens], self.peaks()

    def _run(self, ops: ctypes.Array[Op], batch: ForwardBatch, outputs: Sequence[int]) -> None:
        self._library.run(ops, len(ops), self._steps.fill(batch, outputs))
        self._last_ops, self._num_outputs = ops, len(outputs)

    def peaks(self) -> Peaks:
        best, values = self._peaks
        return best[: self._num_outputs], values[: self._num_outputs]

    def profile(self, batch: ForwardBatch, outputs: Sequence[int]) -> dict[str, float]:
        step = self._steps.fill(batch, outputs)
        seconds: dict[str, float] = {}
        for number, op in enumerate(self._last_ops):
            self._one[0] = op
            began = time.perf_counter()
            self._library.run(self._one, 1, step)
            took = time.perf_counter() - began
            name = "head" if number >= self._head else name_of(op)
            seconds[name] = seconds.get(name, 0.0) + took
        return seconds
