"""Running ops at once, or recording them: where the `native` kernels and attention put every op.

A model is recorded by running its `forward` once on placeholder tensors of the largest batch. Each kernel call then
appends its op instead of running it, with the address of its output buffer; views in between only change addresses and
strides, which an op holds anyway. What the recording cannot see is a torch op that computes: `Tape.recording` forbids
those, so a model that is not made of recordable kernels is refused with a reason and runs op by op.

A gate right after a product becomes part of it (src/linear.h), where nothing else can read what is between them.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interlace.plugins.native.library import (
    GELU_MUL,
    LINEAR,
    OUTPUTS,
    SILU_MUL,
    TOKENS,
    Library,
    Op,
    Step,
    make_op,
)

_VIEWS = frozenset(
    {"view", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "unsqueeze", "squeeze", "expand", "alias",
     "as_strided", "permute", "transpose", "t", "detach", "unbind", "chunk", "_reshape_alias", "narrow", "unflatten"}
)  # fmt: skip

_VIEWS_OR_COPIES = frozenset({"flatten", "reshape", "contiguous"})
"""Seen whole in inference mode; elsewhere torch takes them apart first."""


class Recording(NamedTuple):
    """Stands for an attention backend's metadata while a model is recorded: a step will state the rest."""

    tape: Tape
    group: int


class NotRecordableError(Exception):
    """The model cannot become a program; the message is a clause that says why."""


class _NoCompute(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every torch op that is not a view."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch's compiler is imported, for a second and more, to be told not to compile this

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__  # type: ignore[attr-defined]
        if name not in _VIEWS and name not in _VIEWS_OR_COPIES:
            raise NotRecordableError(f"the model calls torch's {name} between kernels")
        result = func(*args, **(kwargs or {}))
        if name in _VIEWS_OR_COPIES and result.data_ptr() != args[0].data_ptr():
            raise NotRecordableError(f"torch's {name} copies a tensor between kernels")
        return result


class _Pool:
    """Buffers of a recording. One that Python has let go of serves again: later ops run after those that read it."""

    def __init__(self) -> None:
        self.memory: list[torch.Tensor] = []
        self._free: dict[int, list[int]] = {}  # bytes → addresses

    def is_free(self, address: int) -> bool:
        """Whether this is a buffer that nobody holds any more."""
        return any(address in free for free in self._free.values())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = 1
        for size in shape:
            count *= size
        nbytes = -(-count * dtype.itemsize // 64) * 64
        free = self._free.setdefault(nbytes, [])
        if not free:
            block = torch.empty(nbytes + 64, dtype=torch.uint8)
            self.memory.append(block)
            free.append(-(-block.data_ptr() // 64) * 64)
        address = free.pop()
        buffer = (ctypes.c_char * nbytes).from_address(address)
        weakref.finalize(buffer, free.append, address)  # torch keeps `buffer` as long as a tensor or view uses it
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(tuple(shape))


class Tape:
    """Takes ops. Outside a recording each runs at once, over its own number of rows."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._one = (Op * 1)()
        self._no_step = Step()
        self._ops: list[Op] | None = None
        self._pool: _Pool | None = None
        self._kept: list[torch.Tensor] = []
        self._rows: dict[int, int] = {}
        self._placeholders: dict[int, torch.Tensor] = {}

    @property
    def is_recording(self) -> bool:
        return self._ops is not None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for an op's output: fresh, or of the recording."""
        if self._pool is None:
            return torch.empty(tuple(shape), dtype=dtype)
        mode = torch.utils._python_dispatch._disable_current_modes()
        with mode:
            return self._pool.empty(shape, dtype)

    def address(self, tensor: torch.Tensor) -> int | None:
        """What an op's pointer to `tensor` is; None for a placeholder, whose place in memory each step states."""
        pointer = tensor.data_ptr()
        if self._ops is None:
            return pointer
        if pointer in self._placeholders:
            return None
        return pointer

    def emit(
        self,
        code: int,
        dtype: torch.dtype,
        rows: int,
        integers: Sequence[int] = (),
        floats: Sequence[float] = (),
        pointers: Sequence[int | None] = (),
    ) -> None:
        """Run or record one op over `rows` outer rows (the first dimension of its tensors)."""
        if self._ops is None:
            self._one[0] = make_op(code, dtype, rows, integers, floats, pointers)
            self.library.run(self._one, 1, self._no_step)
            return
        if rows not in self._rows:
            raise NotRecordableError(
                f"an op works on {rows} rows, which is neither the tokens nor the outputs of a step"
            )
        self._join_gate(self._ops)
        self._ops.append(make_op(code, dtype, self._rows[rows], integers, floats, pointers))

    def _join_gate(self, ops: list[Op]) -> None:
        """Make one op of the last two if they are a product and the gate of its whole result.

        Asked when the next op comes: by then Python has let go of that result, unless something else will read it."""
        if len(ops) < 2 or ops[-1].code not in (SILU_MUL, GELU_MUL) or ops[-2].code != LINEAR or self._pool is None:
            return
        product, gate = ops[-2], ops[-1]
        plain = product.dtype == gate.dtype and product.rows == gate.rows and not (product.i[2] or product.i[3])
        whole = plain and gate.p[0] == product.p[1] and 2 * gate.i[0] == product.i[1] == gate.i[1]
        if whole and self._pool.is_free(gate.p[0]) and self.library.functions.il_linear_has_halves(product.p[2]):
            ops.pop()
            product.i[1], product.i[3], product.p[1] = gate.i[2], 1 + gate.code, gate.p[1]

    @contextmanager
    def recording(self, max_tokens: int, max_outputs: int, placeholders: Sequence[torch.Tensor]) -> Iterator[list[Op]]:
        """Record instead of running. `max_tokens` and `max_outputs` differ, so that rows tell which is meant."""
        self._ops, self._pool = [], _Pool()
        self._rows = {max_tokens: TOKENS, max_outputs: OUTPUTS}
        self._placeholders = {tensor.data_ptr(): tensor for tensor in placeholders}
        try:
            with _NoCompute():  # type: ignore[no-untyped-call]
                yield self._ops
            self._kept += self._pool.memory
        finally:
            self._ops, self._pool, self._rows, self._placeholders = None, None, {}, {}
