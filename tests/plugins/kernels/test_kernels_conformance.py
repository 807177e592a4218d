"""The conformance suite of kernels: `torch` and the reference pass it, kernels that are wrong on purpose do not."""

from __future__ import annotations

import re

import pytest
import torch

from interlace.interfaces.kernels import Kernels
from interlace.plugins.kernels.torch import TorchKernels
from interlace.testing.conformance import failures
from interlace.testing.kernels_suite import KernelsConformance


class TestTorchKernels(KernelsConformance):
    kernels = "torch"
    seeds = range(5)


class TestReferenceKernels(KernelsConformance):
    """The base class is what everything falls back to."""

    kernels = Kernels
    seeds = range(5)


@pytest.mark.slow
class TestTorchKernelsThoroughly(KernelsConformance):
    kernels = "torch"
    seeds = range(40)


class NarrowSquares(TorchKernels):
    """Takes squares in the type of the input: they overflow in float16."""

    def rms_norm(self, x, weight, eps, unit_offset):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (weight + unit_offset)


class NoUnitOffset(TorchKernels):
    def rms_norm(self, x, weight, eps, unit_offset):
        return super().rms_norm(x, weight, eps, False)


class InPlaceNorm(TorchKernels):
    def rms_norm(self, x, weight, eps, unit_offset):
        return x.copy_(super().rms_norm(x, weight, eps, unit_offset)).clone()


class ResidualScratch(TorchKernels):
    def add_rms_norm(self, x, residual, weight, eps, unit_offset):
        results = super().add_rms_norm(x, residual, weight, eps, unit_offset)
        residual.zero_()
        return results


class PairsRope(TorchKernels):
    """Rotates neighbours instead of halves."""

    def rope(self, query, key, positions, cos_sin):
        def rotate(x):
            rotary = cos_sin.shape[1]
            halves = torch.cat((x[..., 0:rotary:2], x[..., 1:rotary:2], x[..., rotary:]), dim=-1)
            return super(PairsRope, self).rope(halves, halves, positions, cos_sin)[0]

        return rotate(query), rotate(key)


class ExactGelu(TorchKernels):
    def gelu_mul(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate) * up


class View(TorchKernels):
    def silu_mul(self, gate_up):
        _, up = gate_up.chunk(2, dim=-1)
        return up.copy_(super().silu_mul(gate_up))


class NoEmptyLinear(TorchKernels):
    def make_linear(self, weight, bias=None):
        run = super().make_linear(weight, bias)
        return lambda x: torch.stack([run(row[None])[0] for row in x])


class ForgetsBias(TorchKernels):
    def make_linear(self, weight, bias=None):
        return super().make_linear(weight, None)


class ScalesWeight(TorchKernels):
    def make_linear(self, weight, bias=None):
        return super().make_linear(weight.mul_(2).mul(0.5), bias)


class FlatInput(TorchKernels):
    """Takes x for contiguous."""

    def make_linear(self, weight, bias=None):
        run = super().make_linear(weight, bias)
        return lambda x: run(x.as_strided(x.shape, (x.shape[1], 1)))


class WideLinear(TorchKernels):
    def make_linear(self, weight, bias=None):
        run = super().make_linear(weight, bias)
        return lambda x: run(x).float()


class KeepsAllBlocks(TorchKernels):
    """Rounds x to 8 bits for blocks, also where they are to be decoded."""

    def make_block_linear(self, parts, bias=None):
        run = super().make_block_linear(parts, bias)
        return lambda x: run((x * 32).round() / 32)


class AcceptsEverything(TorchKernels):
    @classmethod
    def supports(cls, op, spec):
        return None


class RefusesEverything(TorchKernels):
    @classmethod
    def supports(cls, op, spec):
        return f"{op} is not for me"


class ClaimsLinear(TorchKernels):
    batch_invariant = frozenset({"make_linear"})

    def make_linear(self, weight, bias=None):
        run = super().make_linear(weight, bias)
        return lambda x: run(x) * (1 + len(x) * torch.finfo(x.dtype).eps)


class ClaimsOutputs(TorchKernels):
    """The same in any batch, but not for any number of outputs."""

    batch_invariant = frozenset({"make_linear"})

    def make_linear(self, weight, bias=None):
        run = super().make_linear(weight.double(), bias)
        return lambda x: torch.stack([run(row[None])[0] for row in x]) * (1 + len(weight) * torch.finfo(x.dtype).eps)


class ClaimsUnknown(TorchKernels):
    batch_invariant = frozenset({"linear"})


class NotDeterministic(TorchKernels):
    def embedding(self, token_ids, weight):
        out = super().embedding(token_ids, weight)
        return out * (1 + torch.rand(()) * 3 * torch.finfo(out.dtype).eps)


class SamplesWithoutNucleus(TorchKernels):
    def sample(self, logits, columns, mode):
        return super().sample(logits, columns._replace(top_p=torch.ones_like(columns.top_p)), mode)


class SamplesAnyway(TorchKernels):
    """Gives a token for rows that are no distribution."""

    def sample(self, logits, columns, mode):
        return super().sample(logits, columns, mode).clamp_min(0)


class SamplesByPlace(TorchKernels):
    """The random number depends on where the row stands."""

    def sample(self, logits, columns, mode):
        return super().sample(logits, columns._replace(position=torch.arange(len(logits))), mode)


WRONG = [
    (NarrowSquares, "test_values", "rms_norm in float16"),
    (NoUnitOffset, "test_values", "rms_norm in float32 .* unit_offset True"),
    (InPlaceNorm, "test_values", "wrote into 'x'"),
    (ResidualScratch, "test_values", "`residual` holds neither"),
    (PairsRope, "test_values", "rope in float32"),
    (ExactGelu, "test_values", "gelu_mul in float32"),
    (View, "test_values", "silu_mul .* wrote into 'gate_up'"),
    (NoEmptyLinear, "test_linear", "RuntimeError"),
    (ForgetsBias, "test_linear", "rows, bias: relative error"),
    (ScalesWeight, "test_linear", "wrote into the weight"),
    (FlatInput, "test_linear", "relative error"),
    (WideLinear, "test_linear", "float32, should be in torch.bfloat16"),
    (KeepsAllBlocks, "test_blocks_that_are_not_kept", "blocks of Q8_0, .*float32.*: relative error"),
    (AcceptsEverything, "test_unknown_ways", "no-such-way"),
    (RefusesEverything, "test_something_is_supported", "every op is refused on cpu"),
    (ClaimsLinear, "test_batch_invariance", "make_linear in float32 claims"),
    (ClaimsOutputs, "test_outputs_are_independent", "make_linear for .*; outputs"),
    (SamplesWithoutNucleus, "test_sample", "token [0-9]+ (is excluded|holds)"),
    (SamplesAnyway, "test_sample", "is no distribution"),
    (SamplesByPlace, "test_sample", "the number is"),
    (ClaimsUnknown, "test_claims", r"names \['linear'\]"),
    (NotDeterministic, "test_deterministic", "embedding in .*: two runs differ"),
]


@pytest.mark.parametrize(("wrong", "test", "message"), WRONG, ids=[entry[0].__name__ for entry in WRONG])
def test_wrong_kernels_fail(wrong, test, message):
    class Suite(KernelsConformance):
        kernels = wrong
        seeds = range(12)

    ((name, found),) = failures(Suite, only=test).items()
    assert name.startswith(test)
    assert re.search(message, found), found
