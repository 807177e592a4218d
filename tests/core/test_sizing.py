"""What a worker chooses and takes before it loads: kernels, attention, KV groups, blocks."""

from __future__ import annotations

import pytest

from interlace.config import load_settings
from interlace.errors import CapacityError, PluginError
from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.kv.specs import group_layers
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve
from interlace.worker.sizing import MemoryPlan, ResolvedKernels, build_context, plan_kernels, plan_memory, plan_weights


def plan(**settings: object) -> MemoryPlan:
    loaded = load_settings(constructor=settings)
    return plan_memory(resolve(loaded, PluginManager(loaded.settings)))


def test_the_plan_adds_up() -> None:
    found = plan(dtype="bfloat16", weights="bf16", cache={"memory": "256MiB"}, max_model_len=1024)
    # 134,515,008 parameters of two bytes; a block is 30 layers x keys and values x 32 tokens x 3 heads x 64 x 2 bytes.
    assert found.weights_bytes == 134_515_008 * 2
    assert found.kv.bytes_per_block == 30 * 2 * 32 * 3 * 64 * 2
    assert found.num_blocks == 256 * 2**20 // found.kv.bytes_per_block
    assert found.kv_bytes <= 256 * 2**20
    assert found.max_tokens == (found.num_blocks - 1) * 32


def test_kept_weights_count_in_their_own_type() -> None:
    assert plan(dtype="bfloat16", weights="float32").weights_bytes == 134_515_008 * 4


class KeepsBlocks(Kernels):
    """Has a block product of its own, which is never asked for one here."""

    def make_block_linear(self, parts, bias=None):
        raise AssertionError("only sizes are asked for")


def keeping_blocks(given: KernelSpec) -> ResolvedKernels:
    return ResolvedKernels(given, {"make_block_linear": KeepsBlocks(KeepsBlocks.Options(), given).make_block_linear})


def test_blocks_that_are_kept_count_as_they_are_stored() -> None:
    """SmolLM2's file: 106,168,320 values in Q4_1, 28,311,552 in Q8_0, the rest in float32."""

    loaded = load_settings(constructor={"dtype": "bfloat16"})
    spec = resolve(loaded, PluginManager(loaded.settings))
    given = KernelSpec("bfloat16", "cpu")
    kernels = keeping_blocks(given)
    size, how = plan_weights(spec.architecture.load(), spec, kernels, spec.open_checkpoint())
    in_blocks = 106_168_320 // 32 * 20 + 28_311_552 // 32 * 34
    assert size == in_blocks + 2 * (134_515_008 - 106_168_320 - 28_311_552)
    assert how.name == "as shipped" and "Q4_1 63.3 MiB" in how.reason and "Q8_0 28.7 MiB" in how.reason

    size, how = plan_weights(spec.architecture.load(), spec, ResolvedKernels(given, {}), spec.open_checkpoint())
    assert size == 134_515_008 * 2
    assert (how.name, how.reason) == ("bfloat16", "256.6 MiB, decoded from Q4_1, Q8_0")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dtype": "bfloat16"}, "gather"),  # the file's blocks stay blocks
        ({"dtype": "float32"}, "sum, uncut 1"),  # they are decoded
        ({"dtype": "float32", "weights": "as-shipped"}, "gather"),
        ({"dtype": "float32", "weights": "int8"}, "gather"),
        ({"dtype": "float32", "weights": "bf16"}, "gather"),
        ({"dtype": "bfloat16", "weights": "bf16"}, "sum, uncut 1"),
        ({"dtype": "bfloat16", "weights": "float32"}, "sum, uncut 1"),
        ({"dtype": "bfloat16", "weights": "bf16", "deterministic": True}, "gather"),
        ({"dtype": "float32", "deterministic": True}, "gather"),
        ({"dtype": "bfloat16", "kernels": {"use": "torch"}}, "sum, uncut 1"),  # decodes blocks, rounds nothing
        ({"dtype": "float32", "weights": "bf16", "kernels": {"use": "torch"}}, "gather"),
    ],
)
def test_ranks_gather_where_products_round_their_inputs(settings: dict[str, object], expected: str) -> None:
    loaded = load_settings(constructor=settings)
    spec = resolve(loaded, PluginManager(loaded.settings))
    kernels = plan_kernels(spec)[0]
    context = build_context(spec, kernels, "meta", None, spec.open_checkpoint().stored())
    assert ("gather" if context.gather else f"sum, uncut {context.grain}") == expected


def test_where_inputs_are_cut_blocks_that_are_kept_stay_whole() -> None:
    """Kernels that multiply the file's blocks with x as it is: partial sums are as exact as any."""

    loaded = load_settings(constructor={"dtype": "bfloat16"})
    spec = resolve(loaded, PluginManager(loaded.settings))
    given = KernelSpec("bfloat16", "cpu")
    kernels = keeping_blocks(given)
    context = build_context(spec, kernels, "meta", None, spec.open_checkpoint().stored())
    assert (context.gather, context.grain) == (False, 32)


def test_no_more_blocks_than_could_ever_be_used() -> None:
    found = plan(max_model_len=64, scheduler={"max_num_seqs": 4}, cache={"memory": "256MiB"})
    assert found.num_blocks == 1 + 4 * 2


def test_every_choice_has_a_reason() -> None:
    found = plan()
    assert {choice.kind for choice in found.selections} == {"attention", "kernels", "weights"}
    assert all(choice.reason for choice in found.selections)


@pytest.mark.parametrize("setting", [{"deterministic": True}, {"weights": "int8"}, {"weights": "as-shipped"}])
def test_what_no_provider_can_do_is_refused_with_reasons(setting: dict[str, object]) -> None:
    with pytest.raises(PluginError) as raised:
        plan(kernels={"use": "torch"}, **setting)
    assert "not torch" in str(raised.value)
    assert "batch-invariant" in str(raised.value) or "keeps linear weights" in str(raised.value)


def test_an_impossible_cache_is_refused_before_loading() -> None:
    with pytest.raises(CapacityError, match=r"cache\.memory"):
        plan(cache={"memory": "64KiB"})


def test_layers_of_two_kinds_share_one_pool_in_equal_groups() -> None:
    """Gemma 3's pattern: five windows, then one full layer."""
    keys = [("full", 0, 1, 64) if layer % 6 == 5 else ("window", 512, 1, 64) for layer in range(18)]
    groups = group_layers(keys)
    assert [len(group.layers) for group in groups] == [3] * 6
    assert sorted(layer for group in groups for layer in group.layers) == list(range(18))
    assert [group.kind for group in groups].count("full") == 1
    uneven = group_layers([("full", 0, 1, 64)] * 4 + [("window", 8, 1, 64)] * 7)
    assert sorted(len(group.layers) for group in uneven) == [3, 4, 4]


def test_blocks_of_different_sizes_are_refused() -> None:
    with pytest.raises(CapacityError, match="different sizes"):
        group_layers([("full", 0, 1, 64), ("full", 0, 2, 64)])


def test_layers_that_differ_in_more_than_their_cache_get_backends_of_their_own() -> None:
    """One backend serves a group, and it is built for one soft cap and one scale."""
    plain, capped = AttentionSpec(4, 2, 64), AttentionSpec(4, 2, 64, softcap=30.0)
    groups = group_layers([plain.kv_key, capped.kv_key, plain.kv_key, AttentionSpec(4, 2, 64, scale=0.125).kv_key])
    assert sorted(layer for group in groups for layer in group.layers) == [0, 1, 2, 3]
    assert all(1 not in group.layers or group.layers == (1,) for group in groups)
