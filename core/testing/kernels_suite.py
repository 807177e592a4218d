"""Conformance suite for kernels. A third party subclasses it:

    class TestMyKernels(KernelsConformance):
        kernels = "mine"
        device = "cuda"

Every op that `supports` accepts is compared with its definition in float64, over random shapes (none and one row
among them), slices of larger tensors, and values from tiny to large. What is refused is left out: the core then runs
the reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from interlace.interfaces.kernels import OPS, Kernels, KernelSpec
from interlace.interfaces.weights import BlockWeight
from interlace.sampling.device import SamplingColumns
from interlace.testing import sampling_cases
from interlace.testing.conformance import Conformance, skip
from interlace.testing.kernels_definitions import DEFINITIONS, Arguments

_PLAIN_WEIGHTS = ("auto", "bf16", "float32")
_ROW_OPS = ("rms_norm", "add_rms_norm", "rope", "silu_mul", "gelu_mul", "embedding")
_LINEARS = ("make_linear", "make_block_linear")
_MAKERS = (*_LINEARS, "make_head", "make_block_embedding")
_CALLED = (*_ROW_OPS, *_MAKERS, "scale", "argmax", "sample", "logprobs")
"""Ops that are called with random rows. `draw`, which works on rows of its argument, has tests of its own."""
_OF_LOGITS = ("argmax", "sample", "logprobs")
"""Of these, those that take float32 whatever the compute type: tested with the first one."""
_MADE_OF = {"make_block_linear": "make_linear", "make_head": "make_linear", "make_block_embedding": "embedding"}
"""What the reference makes an op of: its claim holds where it holds for that."""


class KernelsConformance(Conformance):
    """What every kernel set must do, op by op."""

    kind = "kernels"
    selector = "kernels"
    kernels: ClassVar[str | type[Kernels]]
    device: ClassVar[str] = "cpu"
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
    """dtype → largest error allowed, relative to the largest value of the same row."""
    weights_tolerances: ClassVar[Mapping[str, float]] = {"as-shipped": 2e-2, "int8": 3e-2}
    """Ways of keeping weights that round them → the same, for `make_linear`."""

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[Any]]:
        return {
            **super().parameters(),
            "op": OPS,
            "row_op": _ROW_OPS,
            "called_op": _CALLED,
            "dtype": tuple(cls.tolerances),
        }

    # ── Claims ──────────────────────────────────────────────────────────────────────────────────────────────────

    def test_refusals_are_reasons(self, op: str, dtype: str) -> None:
        for weights in self._ways:
            spec = KernelSpec(dtype, self.device, weights)
            reason = self.target.supports(op, spec)
            assert reason is None or (isinstance(reason, str) and reason), f"supports says {reason!r} for {op}, {spec}"
            assert reason == self.target.supports(op, spec), f"supports gives two answers for {op}, {spec}"

    def test_unknown_ways_of_keeping_weights_are_refused(self) -> None:
        spec = KernelSpec(next(iter(self.tolerances)), self.device, "no-such-way")
        reason = self.target.supports("make_linear", spec)
        assert isinstance(reason, str) and reason, f"supports says {reason!r} for linear weights kept as 'no-such-way'"

    def test_something_is_supported(self) -> None:
        """A provider that refuses all there is does nothing on this device."""
        accepted = [
            (op, dtype)
            for op in OPS
            for dtype in self.tolerances
            if self.target.supports(op, KernelSpec(dtype, self.device)) is None
        ]
        assert accepted, f"every op is refused on {self.device} in {', '.join(self.tolerances)}"

    def test_claims_name_ops(self) -> None:
        unknown = set(self.target.batch_invariant) - set(OPS)
        assert not unknown, f"batch_invariant names {sorted(unknown)}; the ops are {', '.join(OPS)}"

    def test_description_is_text(self, op: str, dtype: str) -> None:
        self._skip_if_refused(op, dtype)
        assert isinstance(self._make(dtype).describe(op), str)

    # ── Values ──────────────────────────────────────────────────────────────────────────────────────────────────

    def test_values(self, row_op: str, dtype: str, seed: int) -> None:
        """Right results, in the shape and type of the input; arguments unchanged where they must be, and not kept."""
        self._skip_if_refused(row_op, dtype)
        rng, generator = _sources(seed)
        arguments = self._arguments(row_op, dtype, rng, generator, rng.choice([0, 1, 1, 2, 7, 33, 70]))
        expected = DEFINITIONS[row_op](arguments)
        before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        results = _as_tuple(getattr(self._make(dtype), row_op)(**arguments))
        case = f"{row_op} in {dtype} of {_shapes(arguments)}"
        assert len(results) == len(expected), f"{case}: {len(results)} results instead of {len(expected)}"
        for result, wanted in zip(results, expected, strict=True):
            _compare(result, wanted, getattr(torch, dtype), self.tolerances[dtype], case, _scale(arguments))
        for name, value in before.items():
            if not (row_op == "add_rms_norm" and name == "residual"):
                assert torch.equal(arguments[name], value), f"{case}: wrote into '{name}'"
        if row_op == "add_rms_norm":
            given, total = arguments["residual"], results[1]
            unharmed = torch.equal(given, before["residual"]) or torch.equal(given, total)
            assert unharmed, f"{case}: `residual` holds neither what it held nor the sum"
        kept = [result.clone() for result in results]
        for name in before:
            if name not in ("residual", "positions", "token_ids"):
                arguments[name].fill_(7)
        for result, value in zip(results, kept, strict=True):
            assert torch.equal(result, value), f"{case}: a result is a view of an argument"

    def test_linear(self, dtype: str, seed: int) -> None:
        """With and without a bias, for every way of keeping weights that is accepted."""
        ways = [w for w in self._ways if self.target.supports("make_linear", KernelSpec(dtype, self.device, w)) is None]
        if not ways:
            skip(f"make_linear is refused in {dtype}")
        for weights in ways:
            self._check_linear(KernelSpec(dtype, self.device, weights), *_sources(seed))

    def test_blocks_that_are_not_kept(self, dtype: str, seed: int) -> None:
        """A weight that comes in blocks gives what it gives decoded, for every way that does not keep them."""
        specs = [spec for way in self._ways if not (spec := KernelSpec(dtype, self.device, way)).keeps_blocks]
        makers = ("make_linear", "make_block_linear")
        specs = [spec for spec in specs if all(self.target.supports(op, spec) is None for op in makers)]
        if not specs:
            skip(f"weights in {dtype} are kept in blocks only")
        for spec in specs:
            rng, generator = _sources(seed)
            parts = [_blocks(rows, 64, generator, self.device) for rows in (rng.choice([1, 7, 64]), 33)]
            x = torch.randn(9, 64, generator=generator).to(self.device, getattr(torch, dtype))
            kernels: Kernels = self.target(self.target_options, spec)
            decoded = kernels.make_linear(torch.cat([part.dequantize(spec.decoded_dtype) for part in parts]))
            result = kernels.make_block_linear(parts)(x)
            _compare(result, decoded(x).double(), x.dtype, self.tolerances[dtype], f"blocks of Q8_0, {spec}")

    def _check_linear(self, spec: KernelSpec, rng: random.Random, generator: torch.Generator) -> None:
        in_size, out_size = rng.choice([1, 3, 8, 32, 65, 256]), rng.choice([1, 5, 16, 64, 129])
        shipped = getattr(torch, rng.choice(["float32", spec.dtype, "bfloat16"]))
        weight = torch.randn(out_size, in_size, generator=generator).to(self.device, shipped)
        bias = torch.randn(out_size, generator=generator).to(self.device, shipped) if rng.random() < 0.5 else None
        given, given_bias = weight.clone(), None if bias is None else bias.clone()
        linear = self.target(self.target_options, spec).make_linear(weight, bias)
        kept = getattr(torch, spec.weight_dtype) if spec.weights in _PLAIN_WEIGHTS else torch.float64
        wide_weight = given.to(kept).double()
        for rows in (rng.choice([1, 2, 9, 64]), 0, 1, rng.choice([3, 8, 100])):
            wide = torch.randn(rows, in_size + 5, generator=generator).to(self.device, getattr(torch, spec.dtype))
            x = wide[:, 2 : 2 + in_size] if rng.random() < 0.5 else wide[:, :in_size].contiguous()
            before, wide_x = x.clone(), x.to(kept).double()
            expected = wide_x @ wide_weight.T + (0 if given_bias is None else given_bias.to(kept).double())
            # The size of a sum of that many terms, should they happen to cancel.
            scale = wide_x.norm(dim=1) * wide_weight.norm(dim=1).amax() / in_size**0.5
            case = f"linear [{out_size}, {in_size}], {spec}, {rows} rows, {'no ' if bias is None else ''}bias"
            _compare(linear(x), expected, x.dtype, self._linear_tolerance(spec), case, scale)
            assert torch.equal(x, before), f"{case}: wrote into x"
        assert torch.equal(weight, given), "make_linear wrote into the weight, which may be tied to the embedding"

    def test_sample(self, seed: int) -> None:
        """Tokens on the device: those of `argmax` and `draw`, in every mode that serves a row, -1 for no distribution.

        Where rounding may decide, the token has to be as likely as the one that float64 would have drawn."""
        spec = KernelSpec(next(iter(self.tolerances)), self.device)
        if (reason := self.target.supports("sample", spec)) is not None:
            skip(f"sample: {reason}")
        sampling_cases.check_sample(self.target(self.target_options, spec).sample, self.device, seed)

    def test_logprobs(self, seed: int) -> None:
        """Of the tokens that were chosen and of the most likely ones, and ranks, against float64."""
        spec = KernelSpec(next(iter(self.tolerances)), self.device)
        if (reason := self.target.supports("logprobs", spec)) is not None:
            skip(f"logprobs: {reason}")
        sampling_cases.check_logprobs(self.target(self.target_options, spec).logprobs, self.device, seed)

    def test_batch_invariance_if_claimed(self, dtype: str, seed: int) -> None:
        """A row has the same bits alone, and in any company and order."""
        claimed = [op for op in _CALLED if {op, _MADE_OF.get(op, op)} <= self.target.batch_invariant]
        claimed = [op for op in claimed if self._is_case(op, dtype)]
        accepted = [op for op in claimed if self.target.supports(op, KernelSpec(dtype, self.device)) is None]
        if not accepted:
            skip(f"no op claims batch_invariant in {dtype}")
        for op in accepted:
            rng, generator = _sources(seed)
            rows = rng.choice([2, 9, 40])
            arguments = self._arguments(op, dtype, rng, generator, rows)
            run = _runner(self._make(dtype), op, arguments)
            whole = [result.clone() for result in run(list(range(rows)))]
            for _ in range(6):
                chosen = rng.sample(range(rows), rng.choice([1, 1, rows // 2 + 1, rows]))
                for result, expected in zip(run(chosen), whole, strict=True):
                    assert torch.equal(result, expected[chosen]), (
                        f"{op} in {dtype} claims batch_invariant; rows {chosen} of {_shapes(arguments)} differ in bits"
                    )

    def test_outputs_are_independent_if_claimed(self, dtype: str, seed: int) -> None:
        """Linears that claim batch_invariant give an output the same bits whichever others are made with it."""
        claimed = [op for op in _LINEARS if {op, _MADE_OF.get(op, op)} <= self.target.batch_invariant]
        specs = [KernelSpec(dtype, self.device, weights) for weights in self._ways]
        cases = [(op, spec) for op in claimed for spec in specs if self.target.supports(op, spec) is None]
        if not cases:
            skip(f"no linear claims batch_invariant in {dtype}")
        for op, spec in cases:
            rng, generator = _sources(seed)
            x, weight = self._arguments(op, dtype, rng, generator, 9).values()
            weight = weight if op == "make_linear" else weight[0]
            first, last = sorted(rng.sample(range(weight.shape[0] + 1), 2))
            make = getattr(self.target(self.target_options, spec), op)
            whole, some = (make(w if op == "make_linear" else [w])(x) for w in (weight, weight[first:last]))
            assert torch.equal(some, whole[:, first:last]), f"{op} for {spec}; outputs {first} to {last} differ in bits"

    def test_deterministic_if_asked_for(self, called_op: str, dtype: str, seed: int) -> None:
        """With `KernelSpec.deterministic`, equal input gives equal bits."""
        spec = KernelSpec(dtype, self.device, deterministic=True)
        if not self._is_case(called_op, dtype):
            skip(f"{called_op} takes float32 whatever the compute type")
        if (reason := self.target.supports(called_op, spec)) is not None:
            skip(f"{called_op} in {dtype}: {reason}")
        arguments = self._arguments(called_op, dtype, *_sources(seed), 9)
        first, *others = (
            _runner(self.target(self.target_options, spec), called_op, arguments)(list(range(9))) for _ in range(3)
        )
        for again in others:
            assert all(map(torch.equal, first, again)), f"{called_op} in {dtype}: two runs differ in bits"

    # ── Making cases ────────────────────────────────────────────────────────────────────────────────────────────

    def _is_case(self, op: str, dtype: str) -> bool:
        return op not in _OF_LOGITS or dtype == next(iter(self.tolerances))

    def _make(self, dtype: str) -> Kernels:
        made: Kernels = self.target(self.target_options, KernelSpec(dtype, self.device))
        return made

    def _skip_if_refused(self, op: str, dtype: str) -> None:
        if (reason := self.target.supports(op, KernelSpec(dtype, self.device))) is not None:
            skip(f"{op} in {dtype}: {reason}")

    def _linear_tolerance(self, spec: KernelSpec) -> float:
        """That of the coarser of compute and kept type."""
        types = (self.tolerances.get(dtype, 0.0) for dtype in (spec.dtype, spec.weight_dtype))
        return max(*types, self.weights_tolerances.get(spec.weights, 0.0))

    @property
    def _ways(self) -> tuple[str, ...]:
        return (*_PLAIN_WEIGHTS, *self.weights_tolerances)

    def _arguments(self, op: str, dtype: str, rng: random.Random, generator: torch.Generator, rows: int) -> Arguments:
        """Random arguments of an op. Tensors are slices of larger ones in half of the cases."""
        size = rng.choice([1, 2, 5, 8, 16, 63, 130])
        kind: torch.dtype = getattr(torch, dtype)
        norm_shape = (rng.choice([1, 3]), size) if op == "rms_norm" and rng.random() < 0.5 else (size,)

        def values(*shape: int, scale: float = 1.0) -> torch.Tensor:
            wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).to(self.device, kind) * scale
            return wide[..., 1:-2] if rng.random() < 0.5 else wide[..., 1:-2].contiguous()

        def numbers(below: int) -> torch.Tensor:
            return torch.randint(below, (rows,), generator=generator).to(self.device)

        if op in ("rms_norm", "add_rms_norm"):
            scale = 10.0 ** rng.uniform(-4, 3)  # squares must not be taken in a narrow type
            given = {"x": values(rows, *norm_shape, scale=scale)}
            if op == "add_rms_norm":
                given["residual"] = values(rows, *norm_shape, scale=scale)
            return {**given, "weight": values(size), "eps": rng.choice([1e-5, 1e-6]), "unit_offset": rng.random() < 0.5}
        if op == "rope":
            head_size, half = 2 * size, rng.choice([size, (size + 1) // 2])
            angles = torch.rand(50, half, generator=generator) * 7
            return {
                "query": values(rows, rng.choice([1, 4]), head_size),
                "key": values(rows, rng.choice([1, 2]), head_size),
                "positions": numbers(50),
                "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=1).to(self.device),
            }
        if op in ("silu_mul", "gelu_mul"):
            return {"gate_up": values(rows, 2 * size, scale=rng.choice([0.01, 1.0, 8.0]))}
        if op == "embedding":
            return {"token_ids": numbers(50), "weight": values(50, size).contiguous()}
        if op == "scale":
            return {"x": values(rows, size), "factor": rng.uniform(-2, 2)}
        if op == "sample":
            return sampling_cases.arguments(rows, size + 9, generator, self.device)
        if op == "logprobs":
            return sampling_cases.logprob_arguments(rows, size + 9, generator, self.device)
        if op == "argmax":
            return {"logits": torch.randn(rows, size + 9, generator=generator).to(self.device)}
        outputs = rng.choice([1, 7, 64])
        if op == "make_block_embedding":
            return {"token_ids": numbers(outputs), "weight": _blocks(outputs, 64, generator, self.device)}
        if op == "make_block_linear":
            parts = [_blocks(outputs, 64, generator, self.device), _blocks(33, 64, generator, self.device)]
            return {"x": values(rows, 64), "weight": parts}
        return {"x": values(rows, size), "weight": values(outputs, size).contiguous()}


# ── Small parts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _sources(seed: int) -> tuple[random.Random, torch.Generator]:
    return random.Random(seed), torch.Generator().manual_seed(seed)


def _as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.as_tensor, results if isinstance(results, tuple) else (results,)))


def _blocks(rows: int, size: int, generator: torch.Generator, device: str) -> BlockWeight:
    """A random weight in GGUF's Q8_0: per 32 values a scale in float16 and 32 signed bytes."""
    scales = torch.rand(rows, size // 32, 1, generator=generator).half().view(torch.uint8)
    quants = torch.randint(256, (rows, size // 32, 32), generator=generator).to(torch.uint8)

    def decode(data: torch.Tensor) -> torch.Tensor:
        blocks = data.contiguous().view(data.shape[0], -1, 34)
        scale = blocks[:, :, :2].contiguous().view(torch.float16).float()
        return (blocks[:, :, 2:].contiguous().view(torch.int8) * scale).flatten(1)

    return BlockWeight("Q8_0", (rows, size), torch.cat((scales, quants), dim=2).flatten(1).to(device), decode)


def _shapes(arguments: Arguments) -> str:
    shapes = {
        name: list(value.shape) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _rows(arguments: Arguments, chosen: list[int]) -> Arguments:
    """Copies of the arguments with these rows only."""
    shared = ("weight", "cos_sin")

    def part(value: Any) -> Any:
        if isinstance(value, SamplingColumns):
            return SamplingColumns(*map(part, value))
        return value[chosen].clone() if isinstance(value, torch.Tensor) else value

    return {name: value if name in shared else part(value) for name, value in arguments.items()}


def _runner(kernels: Kernels, op: str, arguments: Arguments) -> Callable[[list[int]], tuple[torch.Tensor, ...]]:
    """chosen rows -> the op's results for them."""
    given = dict(arguments)
    run: Any = getattr(kernels, op)
    if op not in _MAKERS:
        return lambda chosen: _as_tuple(run(**_rows(given, chosen)))
    made = run(given.pop("weight"))
    return lambda chosen: _as_tuple(made(*_rows(given, chosen).values()))


def _scale(arguments: Arguments) -> torch.Tensor | None:
    """Per row the size of the numbers that are computed with, where the results may cancel to much smaller ones."""
    if "gate_up" not in arguments or not len(arguments["gate_up"]):
        return None
    gate, up = arguments["gate_up"].double().chunk(2, dim=-1)
    size: torch.Tensor = (gate * up).abs().amax(1)
    return size


def _compare(
    result: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    tolerance: float,
    case: str,
    scale: torch.Tensor | None = None,
) -> None:
    assert result.shape == expected.shape, f"{case}: result is {list(result.shape)}, should be {list(expected.shape)}"
    assert result.dtype == dtype, f"{case}: result is in {result.dtype}, should be in {dtype}"
    if not expected.numel():
        return
    largest = expected.abs().flatten(1).amax(1).clamp_min(torch.finfo(dtype).tiny)  # per row
    largest = largest if scale is None else torch.maximum(largest, scale)
    errors = (result.double() - expected).abs().flatten(1).amax(1) / largest
    error = torch.where(errors.isfinite(), errors, torch.inf).amax().item()
    assert error <= tolerance, f"{case}: relative error {error:.3g}, allowed {tolerance}"
