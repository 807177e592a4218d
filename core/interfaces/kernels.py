"""The contract of kernels (version 1): the fused building blocks that layers and sampler are made of.

The base class *is* the reference: every op has a readable torch body that runs on any device. A provider overrides
the ops it does better; `supports` may refuse an op for a device or dtype. Ops are resolved one by one, so a provider
is never all or nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import msgspec
from pydantic import BaseModel, ConfigDict

from interlace.interfaces.weights import join_rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from interlace.interfaces.model import LayerCache, Model
    from interlace.interfaces.weights import BlockWeight
    from interlace.sampling.device import LogprobColumns, SamplingColumns, SamplingMode
    from interlace.sampling.distribution import Shape
    from interlace.worker.batch import ForwardBatch

OPS = (
    "rms_norm",
    "add_rms_norm",
    "rope",
    "silu_mul",
    "gelu_mul",
    "scale",
    "embedding",
    "make_linear",
    "make_block_linear",
    "make_block_embedding",
    "make_head",
    "argmax",
    "draw",
    "sample",
    "logprobs",
)
"""The ops of the contract, in the order they are logged."""

GPU_OPS = frozenset({"sample", "logprobs"})
"""Of these, what only steps on a GPU ask for."""


class KernelSpec(msgspec.Struct, frozen=True):
    """Where the ops are to run."""

    dtype: str
    device: str
    weights: str = "auto"
    """How linear weights are kept: auto (= dtype), as-shipped, bf16, int8, float32."""
    deterministic: bool = False

    @property
    def keeps_blocks(self) -> bool:
        """Whether weights that come in blocks of a quantised file stay so. Float32 compute is for exact results: there
        `auto` decodes them."""
        return self.weights == "as-shipped" or (self.weights == "auto" and self.dtype != "float32")

    @property
    def weight_dtype(self) -> str:
        """The torch dtype linear weights are kept in, for the plain ways of keeping them (auto, bf16, float32)."""
        return {"bf16": "bfloat16", "float32": "float32"}.get(self.weights, self.dtype)

    @property
    def decoded_dtype(self) -> torch.dtype:
        """What blocks that are not kept are decoded to for `make_linear`: the type it keeps, or float32 where it
        quantises them anew."""
        import torch

        found: torch.dtype = torch.float32 if self.weights == "int8" else getattr(torch, self.weight_dtype)
        return found


Peaks: TypeAlias = "tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]"
"""Index and value of the largest logit of each row."""


class StepProgram(ABC):
    """A model's forward and head as one call per step; made by `Kernels.compile_step`."""

    @abstractmethod
    def describe(self) -> str:
        """What the program is, in a few words, for the start-up log."""

    @abstractmethod
    def run(self, batch: ForwardBatch, outputs: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [tokens, hidden] after the final norm, logits [outputs, vocab] in float32).

        `outputs`: places in the token dimension whose logits are wanted. Both results are buffers of the program that
        the next `run` overwrites; the caller may write into the logits."""

    def run_greedy(self, batch: ForwardBatch, outputs: Sequence[int]) -> tuple[torch.Tensor, Peaks] | None:
        """Like `run`, for a step of which nobody wants more than the argmax: (hidden, what `Kernels.argmax` gives of
        the logits that `run` gives, to the bit). Buffers, too. None, and nothing run, if `run` is as quick."""
        return None

    def peaks(self) -> Peaks | None:
        """`Kernels.argmax` of the logits as the last `run` left them, if the program found it on the way: buffers, too.
        A sampler that finds these logits unchanged need not look through them."""
        return None

    def profile(self, batch: ForwardBatch, outputs: Sequence[int]) -> dict[str, float]:
        """Run the step op by op, as the last `run` or `run_greedy` did; seconds by kind of op. Empty, and nothing run,
        if the program cannot tell."""
        return {}


class Kernels:
    """Fused ops. Methods may be called from one thread per instance and must not keep their arguments."""

    class Options(BaseModel):
        """Typed options; a subclass replaces this."""

        model_config = ConfigDict(extra="forbid")

    batch_invariant: ClassVar[frozenset[str]] = frozenset(
        {"scale", "make_block_linear", "make_block_embedding", "make_head", "argmax", "draw", "sample", "logprobs"}
    )
    """Ops whose result for a row has the same bits whatever the other rows; of linears, also that for an output
    whatever the other outputs, which other ranks may have. Of the reference: those made of other ops only, and those
    that compute every value alone."""

    def __init__(self, options: BaseModel, spec: KernelSpec) -> None:
        self.options: Any = options
        self.spec = spec

    @classmethod
    def supports(cls, op: str, spec: KernelSpec) -> str | None:
        """None if the provider's own `op` can run under `spec`, else the reason against, as a clause.

        This default is the reference's answer: it keeps weights in a plain floating type only."""
        if op == "make_block_linear" and spec.weights == "as-shipped":
            return "decodes blocks instead of keeping them as shipped"
        if op == "make_linear" and spec.weights not in ("auto", "bf16", "float32"):
            return f"keeps linear weights as auto, bf16 or float32, not as '{spec.weights}'"
        return None

    @classmethod
    def auto_refusal(cls, device: str) -> str | None:
        """None, or why `kernels.use = "auto"` should not ask this provider on `device` although it may run there, as a
        clause."""
        return None

    def describe(self, op: str) -> str:
        """How this instance runs `op`, in a few words, for the start-up log; may be empty."""
        return ""

    def rounds_inputs(self, op: str) -> bool:
        """Whether the products that `op` (`make_linear`, `make_block_linear`) makes round x to a narrower type first.
        The last bit of x then decides now and then which way; so ranks gather x instead of summing parts of it, which
        could turn that bit over (`BuildContext.gather`)."""
        return op == "make_linear" and self.spec.weight_dtype not in (self.spec.dtype, "float32")

    def compile_step(
        self, model: Model, layers: list[LayerCache], max_tokens: int, max_outputs: int
    ) -> StepProgram | str:
        """Make the model's whole step one call, for up to `max_tokens` tokens and `max_outputs` rows of logits; or say,
        as a clause, why that cannot be. Called once, after loading, on the provider that serves every op."""
        return "its kernels make no step programs"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension, computed in float32; `unit_offset`: weight + 1 (Gemma)."""
        wide = x.float()
        wide = wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        if unit_offset:
            return (wide * (1.0 + weight.float())).to(x.dtype)
        return weight * wide.to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual); may write the sum into `residual`."""
        residual = residual + x
        return self.rms_norm(residual, weight, eps, unit_offset), residual

    def rope(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the first `rotary` channels of each head, halves convention (NeoX style).

        query [tokens, heads, head_size], key [tokens, kv_heads, head_size], positions [tokens],
        cos_sin [max_position, rotary] in float32: cosines in the first half, sines in the second.
        """
        import torch

        table = cos_sin[positions].unsqueeze(1)  # [tokens, 1, rotary]
        half = table.shape[-1] // 2
        cos, sin = table[..., :half].to(query.dtype), table[..., half:].to(query.dtype)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

        return rotate(query), rotate(key)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [tokens, 2 * size] holding gate, then up."""
        import torch

        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gelu(gate, tanh approximation) * up for gate_up [tokens, 2 * size]."""
        import torch

        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        """x * factor; may write into `x`."""
        return x * factor

    def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """weight[token_ids]: [tokens, hidden]."""
        return weight[token_ids]

    def make_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Prepare `weight` [out, in] once and return x [tokens, in] -> [tokens, out] in the type of x.

        Called once per linear while loading. `weight` and `bias` come on the right device, in the type they were
        shipped in; the provider converts them to what `spec.weights` asks for. Products run in the type of the kept
        weights: with float32 compute and bf16 weights, x is rounded to bf16 first. The caller drops its own reference
        to `weight`, so a provider may keep any packed form instead."""
        import torch

        dtype: torch.dtype = getattr(torch, self.spec.weight_dtype)
        kept, kept_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return lambda x: torch.nn.functional.linear(x.to(dtype), kept, kept_bias).to(x.dtype)

    def make_block_linear(
        self, parts: Sequence[BlockWeight], bias: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """As `make_linear`, for a weight that comes in blocks: the parts' rows one after the other, perhaps of several
        formats. They stay so where `spec.keeps_blocks`; else they become what `make_linear` makes of them, decoded to
        `spec.decoded_dtype`. A provider that cannot compute with a format decodes it."""
        return self.make_linear(join_rows(parts, self.spec.decoded_dtype, parts[0].data.device), bias)

    def make_head(self, weight: torch.Tensor | Sequence[BlockWeight]) -> Callable[[torch.Tensor], torch.Tensor]:
        """As `make_linear` or `make_block_linear`, for the output head: hidden [rows, hidden] -> logits [rows, out] in
        float32. A provider that overrides this need not round the logits to the compute type first."""
        import torch

        run = self.make_linear(weight) if isinstance(weight, torch.Tensor) else self.make_block_linear(weight)
        return lambda hidden: run(hidden).float()

    def argmax(self, logits: torch.Tensor) -> Peaks:
        """Of logits [rows, vocab] float32: the index of each row's largest value (the first of equal ones; NaN counts
        as the largest) and that value, both [rows] on the host."""
        from interlace.sampling.argmax import argmax

        return argmax(logits)

    def draw(
        self, logits: torch.Tensor, rows: list[int], shapes: Sequence[Shape], uniforms: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        """Draw a token for each of `rows` of logits [all rows, vocab] float32, which may be overwritten there.

        `shapes[i]` says how row `rows[i]` is cut (see `interlace.sampling.distribution`); the token is the first,
        in order of id, whose cumulative probability exceeds `uniforms[i]`; -1 where a row is no distribution (NaN,
        +inf, nothing left). A row's token must not depend on the other rows. Providers may round differently, so a seed
        gives the same tokens with the same provider only."""
        from interlace.sampling.distribution import draw_rows

        return draw_rows(logits, rows, shapes, uniforms)

    def sample(self, logits: torch.Tensor, columns: SamplingColumns, mode: SamplingMode) -> torch.Tensor:
        """The token of every row of logits [rows, vocab] float32, which are left as they are: [rows] int64, on their
        device; -1 where a row is no distribution (NaN, +inf, nothing left).

        The same choice as `argmax` where a row's temperature is 0 and as `draw` elsewhere, with the numbers of
        `interlace.sampling.random`, but nothing waits for the device, and a device graph may hold it: which kernels are
        launched follows from shapes and `mode`, never from values. A row's token must not depend on the other rows, nor
        on a `mode` that offers more than the row uses."""
        from interlace.sampling.device import sample_rows

        return sample_rows(logits, columns, mode)

    def logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, counts: torch.Tensor) -> LogprobColumns:
        """Log probabilities of `token_ids` [rows] int64 (-1, of a row that failed, is allowed), their ranks, and the
        most likely tokens with theirs, `MAX_LOGPROBS` of them or the whole vocabulary if that is smaller; on the device
        of logits [rows, vocab] float32, which are left as they are. All is said of the raw distribution, log_softmax of
        the row; a rank is one more than the number of tokens that are more likely.

        `counts` [rows] int32: how many of the most likely tokens a row asks for; -1: nothing at all. What was not asked
        for may hold anything. As in `sample`, nothing waits for the device, and a device graph may hold it. A row's
        result must not depend on the other rows; of equally likely tokens any may come first."""
        from interlace.sampling.logprobs import report_logits

        return report_logits(logits, token_ids)

    def make_block_embedding(self, weight: BlockWeight) -> Callable[[torch.Tensor], torch.Tensor]:
        """As `embedding`, for a weight that comes in blocks: token ids [tokens] -> [tokens, hidden] in `spec.dtype`,
        whatever `spec.weights` says.

        `weight.data` may be kept: only rows that are asked for need to be read from the file."""
        import torch

        values = weight.dequantize(getattr(torch, self.spec.dtype))
        return lambda token_ids: self.embedding(token_ids, values)
