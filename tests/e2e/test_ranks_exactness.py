"""SmolLM2 over several ranks: the greedy tokens of transformers, as one rank gives them (see test_exactness.py)."""

from __future__ import annotations

import msgspec
import pytest

from interlace.catalog import resolve_model
from interlace.config import load_settings
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve
from interlace.testing.executor_driver import Driver, WorkerExecutor
from interlace.testing.parity import Agreement, Reference, agreement
from interlace.testing.ranks import ThreadedRanks

TOKENS = 24


FORMS = [
    {"dtype": "bfloat16"},  # blocks of the file: what this model runs with unless told otherwise
    {"dtype": "float32", "weights": "as-shipped"},
    {"dtype": "bfloat16", "weights": "int8"},
    {"dtype": "float32", "weights": "int8"},
    {"dtype": "float32", "weights": "bf16"},
    {"dtype": "float32", "deterministic": True},
    {"dtype": "bfloat16", "weights": "bf16", "deterministic": True},
]


class Recorder(Driver):
    """Keeps the log probabilities of the tokens, too."""

    def __init__(self, executor, spec):
        self.logprobs = {}
        super().__init__(executor, spec, timeout_s=300.0)

    def _absorb(self, output):
        super()._absorb(output)
        for name, entries in output.logprobs.items():
            self.logprobs.setdefault(name, []).extend(entry.logprobs for entry in entries)


@pytest.fixture(scope="module")
def alone():
    """Form of weights → what one rank gives."""
    return {}


def stored(repo_root) -> list[Reference]:
    document = msgspec.json.decode((repo_root / "tests" / "e2e" / "references" / "smollm2.json").read_bytes())
    return msgspec.convert(document["references"], list[Reference])[:8]


def generate(executor, prompts, **settings):
    """Per prompt (tokens, log probabilities of these and of the best two)."""
    given = {"model": resolve_model("smollm2").path, "max_model_len": 1024, "cache.memory": "256MiB", "threads": 1}
    loaded = load_settings(
        {**given, "cache.block_size": 32, "scheduler.max_num_batched_tokens": 256} | settings, env={}
    )
    try:
        driver = Recorder(executor, resolve(loaded, PluginManager(loaded.settings)))
        greedy = {"temperature": 0.0, "max_tokens": TOKENS, "logprobs": 2, "ignore_eos": True}
        names = [driver.add(prompt, **greedy) for prompt in prompts]
        driver.run()
        assert not any(driver.errors.values()), driver.errors
        return [(driver.tokens[name], driver.logprobs[name]) for name in names]
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
    results = [agreement(reference, tokens)[0] for reference, (tokens, _) in zip(cut, outputs, strict=True)]
    print(f"{layout}: {results.count(Agreement.EQUAL)} of {len(results)} equal, ties {results.count(Agreement.TIE)}")
    assert Agreement.DIFFERENT not in results
    assert results.count(Agreement.TIE) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("settings", FORMS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_same_bits_where_ranks_gather(settings, layout, repo_root, alone):
    """Weights whose products round activations, and all weights if `deterministic` is true: not a bit of a token's log
    probability changes, after thirty layers."""
    prompts = [reference.prompt_token_ids for reference in stored(repo_root)[:4]]
    key = msgspec.json.encode(settings)
    if key not in alone:
        alone[key] = generate(WorkerExecutor(), prompts, **settings)
    assert generate(ranks(*layout), prompts, **settings) == alone[key]
