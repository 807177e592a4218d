"""Kernels `triton`: the ops of the contract for GPUs (see plugins/triton); linears are left to torch, which has cuBLAS.

Modules with Triton kernels are imported where an op needs them, so that `supports` can say that Triton is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.plugins.triton import runtime
from interlace.sampling.device import LogprobColumns, SamplingColumns, SamplingMode

if TYPE_CHECKING:
    from interlace.sampling.distribution import Shape

_DTYPES = ("bfloat16", "float16", "float32")
_MAX_VOCAB = 1 << 18
"""Weights of more tokens might not add up in 63 bits."""


class TritonKernels(Kernels):
    """One launch per op; a row's bits never depend on the batch, nor on how it is cut into programs."""

    batch_invariant: ClassVar[frozenset[str]] = Kernels.batch_invariant | {
        "rms_norm",
        "add_rms_norm",
        "rope",
        "silu_mul",
        "gelu_mul",
        "embedding",
    }

    @classmethod
    def supports(cls, op: str, spec: KernelSpec) -> str | None:
        if (reason := super().supports(op, spec)) is not None:
            return reason
        if spec.dtype not in _DTYPES:
            return f"computes in {', '.join(_DTYPES)}, not in {spec.dtype}"
        return runtime.refusal(spec.device)

    @classmethod
    def auto_refusal(cls, device: str) -> str | None:
        return runtime.auto_refusal(device)

    def describe(self, op: str) -> str:
        return "interpreted" if torch.device(self.spec.device).type == "cpu" else ""

    # ── Norms and positions ─────────────────────────────────────────────────────────────────────────────────────

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
        from interlace.plugins.triton.norms import rms_norm

        return rms_norm(_dense_last(x), weight.contiguous(), eps, unit_offset)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from interlace.plugins.triton.norms import add_rms_norm

        return add_rms_norm(_dense_last(x), _dense_last(residual), weight.contiguous(), eps, unit_offset)

    def rope(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from interlace.plugins.triton.rope import rope

        return rope(_dense_last(query), _dense_last(key), positions, _dense_last(cos_sin))

    # ── Values one by one ───────────────────────────────────────────────────────────────────────────────────────

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        from interlace.plugins.triton.elementwise import gate_mul

        return gate_mul(_dense_last(gate_up), "silu")

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        from interlace.plugins.triton.elementwise import gate_mul

        return gate_mul(_dense_last(gate_up), "gelu")

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        from interlace.plugins.triton.elementwise import scale

        return scale(_dense_last(x), factor)

    def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from interlace.plugins.triton.elementwise import embedding

        return embedding(token_ids, _dense_last(weight))

    # ── Sampling ────────────────────────────────────────────────────────────────────────────────────────────────

    def argmax(self, logits: torch.Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        from interlace.plugins.triton.sampling import argmax

        best, peaks = argmax(_dense_last(logits))
        return best.cpu().numpy(), peaks.cpu().numpy()

    def draw(
        self, logits: torch.Tensor, rows: list[int], shapes: Sequence[Shape], uniforms: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        if logits.shape[1] > _MAX_VOCAB:
            return super().draw(logits, rows, shapes, uniforms)
        from interlace.plugins.triton.sampling import draw

        device = self.spec.device
        if len(rows) != logits.shape[0]:
            logits = logits[runtime.to_device(np.array(rows, dtype=np.int64), device)]
        # A temperature of 0 would mean greedy there; here it is one that is very small.
        floats = np.array([(max(t, 1e-30), p, m) for t, _, p, m in shapes], dtype=np.float32).reshape(-1, 3)
        temperature, top_p, min_p = runtime.to_device(floats.T.copy(), device)
        top_k = runtime.to_device(np.array([shape.top_k for shape in shapes], dtype=np.int32), device)
        unused = torch.empty(0, dtype=torch.int64, device=logits.device)
        columns = SamplingColumns(temperature, top_k, top_p, min_p, unused, unused, unused)
        numbers = runtime.to_device(np.ascontiguousarray(uniforms), device)
        drawn: npt.NDArray[np.int64] = draw(_dense_last(logits), columns, numbers).cpu().numpy()
        return drawn

    def sample(self, logits: torch.Tensor, columns: SamplingColumns, mode: SamplingMode) -> torch.Tensor:
        if logits.shape[1] > _MAX_VOCAB and mode is not SamplingMode.GREEDY:
            return super().sample(logits, columns, mode)
        from interlace.plugins.triton.sampling import sample

        return sample(_dense_last(logits), columns, mode)

    def logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, counts: torch.Tensor) -> LogprobColumns:
        from interlace.plugins.triton.logprobs import logprobs

        return logprobs(_dense_last(logits), token_ids, counts)


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if neighbours along the last dimension are not neighbours in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
