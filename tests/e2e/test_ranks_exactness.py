"""SmolLM2 over several ranks: the greedy tokens of transformers, as one rank gives them (see test_exactness.py)."""

from __future__ import annotations

import msgspec
import pytest

from interlace.catalog import resolve_model
from interlace.config import load_settings
from interlace.plugin_manager import PluginManager
from interlace.plugins.attention.torch import TorchAttention
from interlace.plugins.kernels.native import NativeKernels
from interlace.resolve import resolve
from interlace.testing.executor_driver import Driver, WorkerExecutor
from interlace.testing.model_harness import ModelHarness
from interlace.testing.parity import Agreement, Reference, agreement
from interlace.testing.ranks import ThreadedParallel, ThreadedRanks

TOKENS = 24


def stored(repo_root) -> list[Reference]:
    document = msgspec.json.decode((repo_root / "tests" / "e2e" / "references" / "smollm2.json").read_bytes())
    return msgspec.convert(document["references"], list[Reference])[:8]


def generate(executor, prompts, **settings):
    given = {"model": resolve_model("smollm2").path, "max_model_len": 1024, "cache.memory": "256MiB", "threads": 1}
    loaded = load_settings(
        {**given, "cache.block_size": 32, "scheduler.max_num_batched_tokens": 256} | settings, env={}
    )
    try:
        driver = Driver(executor, resolve(loaded, PluginManager(loaded.settings)), 300.0)
        names = [driver.add(prompt, temperature=0.0, max_tokens=TOKENS, ignore_eos=True) for prompt in prompts]
        driver.run()
        assert not any(driver.errors.values()), driver.errors
        return [driver.tokens[name] for name in names]
    finally:
        executor.shutdown()


def ranks(tensor_parallel, pipeline_parallel):
    options = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    return ThreadedRanks(ThreadedRanks.Options(**options))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1), (4, 1), (2, 2)])
def test_greedy_in_float32(layout, repo_root):
    """Two ranks hold 6/2 and 3/1 heads; four hold a copy of one KV head on two of them."""
    references = stored(repo_root)
    outputs = generate(ranks(*layout), [reference.prompt_token_ids for reference in references], dtype="float32")
    cut = [Reference(one.prompt_token_ids, one.token_ids[:TOKENS], one.gaps[:TOKENS]) for one in references]
    results = [agreement(reference, tokens)[0] for reference, tokens in zip(cut, outputs, strict=True)]
    print(f"{layout}: {results.count(Agreement.EQUAL)} of {len(results)} equal, ties {results.count(Agreement.TIE)}")
    assert Agreement.DIFFERENT not in results
    assert results.count(Agreement.TIE) <= 1


@pytest.mark.slow
def test_blocks_as_shipped_over_stages(repo_root):
    """Stages exchange what they would have computed themselves: nothing changes, to the last bit."""
    prompts = [reference.prompt_token_ids for reference in stored(repo_root)]
    settings = {"dtype": "float32", "weights": "as-shipped"}
    assert generate(ranks(1, 3), prompts, **settings) == generate(WorkerExecutor(), prompts, **settings)


@pytest.mark.slow
def test_blocks_as_shipped_over_tensor_ranks(repo_root):
    """Activations are rounded to 8 bits, so the last bit of a sum decides now and then which way, and thirty layers
    make it visible: tokens are not those of one rank. But they are as near to float32's."""
    loaded = load_settings({"model": resolve_model("smollm2").path}, env={})
    spec = resolve(loaded, PluginManager(loaded.settings))
    reference = stored(repo_root)[0]
    tokens = (reference.prompt_token_ids + reference.token_ids)[:64]

    def logits(kept, size=1):
        def work(rank):
            harness = ModelHarness(
                spec.architecture.load(),
                spec.model_config,
                spec.open_checkpoint().weights(),
                attention=TorchAttention,
                kernels=NativeKernels,
                kept_weights=kept,
                parallel=rank,
                grain=32,
                block_size=32,
            )
            return harness.run(tokens)

        return ThreadedParallel.run(size, work)[0].log_softmax(-1)

    def divergence(found):
        return (exact.exp() * (exact - found)).sum(-1).mean().item()

    exact = logits("float32")
    alone, together = divergence(logits("as-shipped")), [divergence(logits("as-shipped", size)) for size in (2, 3)]
    assert 0 < alone < 0.01
    assert max(together) < 1.5 * alone, (alone, together)
