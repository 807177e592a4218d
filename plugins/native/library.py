"""Loads the compiled kernels and runs programs of ops; the Python face of src/native.h."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

ABI = 4
AUTO = "auto"

F32, BF16 = 0, 1
DTYPES = {torch.float32: F32, torch.bfloat16: BF16}

TOKENS, OUTPUTS = -1, -2
"""`rows` of an op that are known only when a step runs."""

(
    RMS_NORM,
    ADD_RMS_NORM,
    ROPE,
    SILU_MUL,
    GELU_MUL,
    EMBEDDING,
    LINEAR,
    ATTENTION,
    ARGMAX,
    COPY_ROWS,
    SCALE,
    BLOCK_EMBEDDING,
    DRAW,
    SCREENED_ARGMAX,
) = range(14)

OP_NAMES = (
    "rms_norm",
    "add_rms_norm",
    "rope",
    "silu_mul",
    "gelu_mul",
    "embedding",
    "linear",
    "attention",
    "argmax",
    "copy_rows",
    "scale",
    "block_embedding",
    "draw",
    "screened_argmax",
)
"""By code."""

DRAW_LIMIT = 500_000
"""Largest vocabulary that `DRAW` has room for."""


class Op(ctypes.Structure):
    """il_op."""

    _fields_ = (
        ("code", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("i", ctypes.c_int64 * 12),
        ("f", ctypes.c_double * 4),
        ("p", ctypes.c_void_p * 8),
    )


class Group(ctypes.Structure):
    """il_group."""

    _fields_ = (("block_table", ctypes.c_void_p), ("table_stride", ctypes.c_int64), ("slots", ctypes.c_void_p))


class Step(ctypes.Structure):
    """il_step."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("groups", ctypes.POINTER(Group)),
        ("num_groups", ctypes.c_int64),
    )


class NativeUnavailableError(Exception):
    """The kernels cannot be used here; the message is a clause that says why."""


def _load(path: str | None = None) -> ctypes.CDLL:
    """The library that the install built (or the one at `path`). Raises `NativeUnavailableError`."""
    found = [Path(path)] if path else sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        raise NativeUnavailableError(
            "the C++ kernels were not built when Interlace was installed (no C++ compiler was found then); install g++ "
            "and reinstall"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise NativeUnavailableError(f"the compiled kernels do not load: {error}") from error
    if library.il_abi() != ABI:
        raise NativeUnavailableError(
            f"{found[0].name} is of another version of Interlace (ABI {library.il_abi()}, expected {ABI}); reinstall"
        )
    pointer, c_int32, c_int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures = {
        "il_supported_isas": (ctypes.c_char_p, []),
        "il_open": (pointer, [c_int32, ctypes.c_char_p]),
        "il_close": (None, [pointer]),
        "il_run": (c_int64, [pointer, pointer, c_int64, pointer]),
        "il_use_huge_pages": (None, [pointer, c_int64]),
        "il_linear_pack": (
            pointer,
            [pointer, pointer, c_int64, c_int64, c_int32, c_int32, pointer, pointer, c_int64],
        ),
        "il_linear_free": (None, [pointer]),
        "il_linear_bytes": (c_int64, [pointer]),
        "il_linear_has_halves": (c_int32, [pointer]),
        "il_screen_make": (pointer, [pointer, pointer, c_int32]),
        "il_screen_copy": (pointer, [pointer]),
        "il_screen_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is not None:
            function.restype, function.argtypes = result, arguments
    return library


def supported_isas() -> list[str]:
    """Instruction sets this processor can run, best first. Raises `NativeUnavailableError`."""
    return str(_load().il_supported_isas().decode()).split()


class Library:
    """The kernels on a team of threads. All users in one process that ask for the same share one team."""

    def __init__(self, threads: int, isa: str = AUTO) -> None:
        """`isa`: a name of `supported_isas()`, or `auto` for the best. Raises `NativeUnavailableError`."""
        self._library = _load()
        known = supported_isas()
        self.isa = known[0] if isa == AUTO else isa
        if self.isa not in known:
            raise NativeUnavailableError(f"isa = '{isa}' is not for this CPU, which has {', '.join(known)}")
        self.threads = threads
        self.handle = self._library.il_open(threads, self.isa.encode())
        weakref.finalize(self, self._library.il_close, self.handle)

    @property
    def functions(self) -> ctypes.CDLL:
        """The C functions, for what is not an op (packing weights)."""
        return self._library

    def use_huge_pages(self, memory: torch.Tensor) -> None:
        """Advise the system to back `memory` with huge pages, as far as it has not been touched yet."""
        self._library.il_use_huge_pages(memory.data_ptr(), memory.nbytes)

    def run(self, ops: ctypes.Array[Op], count: int, step: Step) -> None:
        """Run the first `count` ops on the team; releases the GIL meanwhile. What the ops point to must stay alive."""
        failed = self._library.il_run(self.handle, ctypes.addressof(ops), count, ctypes.addressof(step))
        if failed:
            code = ops[failed - 1].code
            raise RuntimeError(f"op {failed - 1} of the program has code {code}, which {self.isa} does not have")


def make_op(
    code: int,
    dtype: torch.dtype,
    rows: int,
    integers: Sequence[int] = (),
    floats: Sequence[float] = (),
    pointers: Sequence[int | None] = (),
) -> Op:
    """An op; what its numbers mean is said in src/."""
    op = Op(code=code, dtype=DTYPES[dtype], rows=rows)
    op.i[: len(integers)] = list(integers)
    op.f[: len(floats)] = list(floats)
    op.p[: len(pointers)] = list(pointers)
    return op
