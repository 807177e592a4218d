"""The conformance suite of attention backends: `torch` passes it, backends that are wrong on purpose do not."""

from __future__ import annotations

import re
from typing import ClassVar

import msgspec
import pytest

from interlace.errors import PluginContractError, PluginNotFoundError
from interlace.plugins.attention.torch import TorchAttention
from interlace.testing.attention_suite import AttentionConformance
from interlace.testing.conformance import failures
from interlace.testing.reference import ReferenceAttention


class TestTorchAttention(AttentionConformance):
    attention = "torch"
    seeds = range(6)


@pytest.mark.slow
class TestTorchAttentionThoroughly(AttentionConformance):
    attention = "torch"


class TestReferenceAttention(AttentionConformance):
    """The backend that models are tested with, and that has no code in common with `torch`."""

    attention = ReferenceAttention
    seeds = range(3)
    tolerances: ClassVar = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3, "float64": 1e-12}


class ReadsEverything(TorchAttention):
    def forward(self, query, key, value, cache, metadata):
        return super().forward(query, key, value, cache, metadata) + 0 * cache.sum().to(query.dtype)


class WideWindow(TorchAttention):
    def __init__(self, options, spec, *rest):
        super().__init__(options, msgspec.structs.replace(spec, window=spec.window + 1), *rest)


class FirstGroup(TorchAttention):
    def prepare(self, batch, group):
        return super().prepare(batch, 0)


class WritesNullBlock(TorchAttention):
    def forward(self, query, key, value, cache, metadata):
        cache[0] = 0
        return super().forward(query, key, value, cache, metadata)


class NoSoftcap(TorchAttention):
    def __init__(self, options, spec, *rest):
        super().__init__(options, msgspec.structs.replace(spec, softcap=0.0), *rest)


class GroupedOtherwise(TorchAttention):
    """Query head h reads KV head h % kv_heads."""

    def forward(self, query, key, value, cache, metadata):
        shape = (len(query), -1, self.spec.num_kv_heads, self.spec.head_size)
        swapped = query.reshape(shape).transpose(1, 2).reshape(query.shape)
        out = super().forward(swapped, key, value, cache, metadata)
        shape = (len(query), self.spec.num_kv_heads, -1, self.spec.head_size)
        return out.reshape(shape).transpose(1, 2).reshape(query.shape)


class AcceptsEverything(TorchAttention):
    @classmethod
    def supports(cls, spec, block_size, dtype, device):
        return None


class SilentRefusal(TorchAttention):
    @classmethod
    def supports(cls, spec, block_size, dtype, device):
        return super().supports(spec, block_size, dtype, device) and ""


class UnderstatesMemory(TorchAttention):
    def cache_layout(self, num_blocks):
        return msgspec.structs.replace(super().cache_layout(num_blocks), nbytes=num_blocks)


class FixedCost(TorchAttention):
    """One more block than asked for."""

    def cache_layout(self, num_blocks):
        return super().cache_layout(num_blocks + 1)


class Remembers(TorchAttention):
    """Keeps what it wrote outside the cache too, by slot."""

    def forward(self, query, key, value, cache, metadata):
        slots = cache.flatten(0, 1)
        kept = self.__dict__.setdefault("_kept", {})
        for slot, written in kept.items():
            slots[slot] = written
        out = super().forward(query, key, value, cache, metadata)
        kept |= {slot: slots[slot].clone() for slot in metadata.write_slots.tolist()}
        return out


class OnceAStep(TorchAttention):
    """Its metadata serve one layer."""

    def forward(self, query, key, value, cache, metadata):
        out = super().forward(query, key, value, cache, metadata)
        for chunk in metadata.decode:
            chunk.tokens.zero_()
        return out


class ClaimsInvariance(TorchAttention):
    batch_invariant = True


class Wider(TorchAttention):
    def forward(self, query, key, value, cache, metadata):
        return super().forward(query, key, value, cache, metadata).float()


class PlansWithPadding(ReferenceAttention):
    """Takes the lengths to the host when a graph is made, not when it runs."""

    def prepare_decode(self, batch, group):
        return super().prepare_decode(batch._replace(seq_lens=batch.seq_lens.clone()), group)


class WritesPaddingAnywhere(ReferenceAttention):
    def forward(self, query, key, value, cache, metadata):
        cache[-1] = 0
        return super().forward(query, key, value, cache, metadata)


class GraphsForgotten(TorchAttention):
    graph_support = "decode"


WRONG = [
    (ReadsEverything, "unwritten_slots", "error inf"),
    (WideWindow, "random_traffic", "window=[1-9]"),
    (FirstGroup, "random_traffic", "were written"),
    (WritesNullBlock, "random_traffic", r"blocks \[0\] were written"),
    (NoSoftcap, "random_traffic", "softcap=1.5"),
    (GroupedOtherwise, "random_traffic", "error"),
    (AcceptsEverything, "impossible", "no-such-kind"),
    (AcceptsEverything, "have_a_tolerance", "nobody tests it"),
    (SilentRefusal, "impossible", "supports says ''"),
    (UnderstatesMemory, "cache_layout", "states 37 bytes"),
    (FixedCost, "cache_layout", "first dimension"),
    (Remembers, "blocks_can_be_moved", "after blocks were moved|were written"),
    (OnceAStep, "one_metadata", "error"),
    (ClaimsInvariance, "batch_invariance", "bits differ"),
    (Wider, "every_type", "the query in torch.bfloat16"),
    (PlansWithPadding, "device_graph", "decode step 0 in a device graph"),
    (WritesPaddingAnywhere, "device_graph", "were written"),
    (GraphsForgotten, "device_graph", "graph_support = 'decode' without prepare_decode"),
]


@pytest.mark.parametrize(("backend", "test", "message"), WRONG, ids=[entry[0].__name__ for entry in WRONG])
def test_wrong_backends_fail(backend, test, message):
    class Suite(AttentionConformance):
        attention = backend
        seeds = range(12)

    ((name, found),) = failures(Suite, only=test).items()
    assert test in name

    assert re.search(message, found), found


def test_what_cannot_be_tested_is_said_at_once():
    with pytest.raises(PluginNotFoundError, match=r"no attention backend is called 'trch' \(Suite\.attention\).*torch"):
        failures(type("Suite", (AttentionConformance,), {"attention": "trch"}))
    with pytest.raises(PluginContractError, match=r"Suite\.attention: .*int.* is not a subclass of .*AttentionBackend"):
        failures(type("Suite", (AttentionConformance,), {"attention": int}))
    with pytest.raises(TypeError, match=r"write `attention = "):
        failures(type("Suite", (AttentionConformance,), {}))
    half = type("Half", (TorchAttention,), {"forward": ReferenceAttention.__base__.forward})
    with pytest.raises(PluginContractError, match="Half lacks forward"):
        failures(type("Suite", (AttentionConformance,), {"attention": half}))
