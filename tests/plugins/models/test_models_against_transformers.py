"""Every architecture, with every switch it has, against transformers on the same random weights."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from interlace.errors import CheckpointError
from interlace.testing.model_harness import ThreadedParallel

CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-biased": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-one-kv-head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-no-grouping": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 10}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3-window-biased": (
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "attention_bias": True},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24},
    ),
    "gemma3-final-softcap": (
        "Gemma3ForCausalLM",
        {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        | {"final_logit_softcapping": 3.0},
    ),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    # The largest logits of these checkpoints are about 30: relative to that, 1e-4 is 3e-6.
    assert (actual - expected).abs().max().item() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_logits_whole_chunked_and_mixed(tiny, prompt, case):
    architecture, changes = CASES[case]
    checkpoint = tiny(architecture, **changes)
    harness = checkpoint.harness()
    expected = checkpoint.logits(prompt)
    assert expected.std() > 0.3, "the reference must not be flat, or anything would match"
    assert_close(harness.run(prompt), expected)
    assert_close(harness.run(prompt, chunk=7), expected)
    assert_close(harness.run(prompt, chunk=1), expected)

    # Three sequences at different stages: a decodes while b prefills in chunks and c comes late.
    other = prompt[::-1]
    steps = [
        {"a": prompt[:11], "b": other[:5]},
        {"a": prompt[11:12], "b": other[5:14], "c": prompt[:1]},
        {"c": prompt[1:17], "a": prompt[12:13], "b": other[14:15]},
        {"b": other[15:16], "c": prompt[17:18], "a": prompt[13:14]},
    ]
    results = [harness.step(step) for step in steps]
    for name, tokens in (("a", prompt[:14]), ("b", other[:16]), ("c", prompt[:18])):
        actual = torch.cat([result[name] for result in results if name in result])
        assert_close(actual, checkpoint.logits(tokens))


def test_a_window_hides_older_tokens(tiny, prompt):
    """The windows of the cases above do matter: with two layers of window 4, token 8 cannot know token 0."""
    checkpoint = tiny("MistralForCausalLM", sliding_window=4, num_hidden_layers=2)
    harness = checkpoint.harness()
    changed = [prompt[0] + 1, *prompt[1:]]
    first, second = harness.run(prompt), harness.run(changed)
    assert (first[6] - second[6]).abs().max() > 1e-3
    assert torch.equal(first[7:], second[7:])


def test_gemma_attention_softcap(tiny, prompt):
    """transformers' Gemma 3 reads `attn_logit_softcapping` but drops it; its own eager attention can apply it."""
    AttentionInterface.register("softcapped", functools.partial(eager_attention_forward, softcap=2.0))
    checkpoint = tiny("Gemma3ForCausalLM", sliding_window=8, attn_logit_softcapping=2.0)
    uncapped = checkpoint.logits(prompt)
    mask = torch.ones(len(prompt), len(prompt), dtype=torch.bool).tril()
    window = mask & ~mask.tril(-8)
    additive = {
        kind: torch.zeros(seen.shape).masked_fill(~seen, -1e9)[None, None]
        for kind, seen in (("full_attention", mask), ("sliding_attention", window))
    }
    checkpoint.reference.config._attn_implementation = "softcapped"
    with torch.inference_mode():
        expected = checkpoint.reference(torch.tensor([prompt]), attention_mask=additive, use_cache=False).logits[0]
    assert (expected - uncapped).abs().max() > 1e-2
    harness = checkpoint.harness()
    assert_close(harness.run(prompt), expected)
    assert_close(harness.run(prompt, chunk=7), expected)
    assert_close(harness.run(prompt, chunk=1), expected)


@pytest.mark.parametrize("case", ["llama-tied-biased", "llama-one-kv-head", "qwen3", "gemma3"])
def test_two_ranks_equal_one(tiny, prompt, case):
    """The whole model split over two ranks (97 tokens of vocabulary: the last rank is padded; one KV head: shared)."""
    architecture, changes = CASES[case]
    checkpoint = tiny(architecture, **changes)
    ranks = ThreadedParallel.make(2)
    results: dict[int, torch.Tensor] = {}

    def work(rank: ThreadedParallel) -> None:
        results[rank.rank] = checkpoint.harness(parallel=rank).run(prompt, chunk=10)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(results[0], checkpoint.logits(prompt))
    assert torch.equal(results[0], results[1])


def test_attention_specs_need_no_weights(tiny):
    checkpoint = tiny("Gemma3ForCausalLM", num_hidden_layers=6, sliding_window=8, num_key_value_heads=1)
    specs = checkpoint.model.attention_specs(checkpoint.config, tensor_parallel=2)
    assert [(spec.kind, spec.window) for spec in specs] == [("window", 8)] * 5 + [("full", 0)]
    assert {(spec.num_heads, spec.num_kv_heads) for spec in specs} == {(2, 1)}


def test_bf16_follows_float32(tiny, prompt):
    checkpoint = tiny("LlamaForCausalLM", initializer_range=0.1)
    expected = checkpoint.logits(prompt)
    actual = checkpoint.harness(dtype="bfloat16").run(prompt, chunk=7)
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def test_weight_that_does_not_fit_is_named(tiny):
    checkpoint = tiny("LlamaForCausalLM")
    weights = dict(checkpoint.weights())
    del weights["model.layers.0.self_attn.k_proj.weight"], weights["model.layers.1.self_attn.k_proj.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 5)
    weights["model.layers.2.mlp.up_proj.qweight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        checkpoint._replace(reference=FakeReference(weights)).harness()
    assert "missing: model.layers.{0-1}.self_attn.k_proj.weight" in str(caught.value)
    assert "unexpected: model.layers.2.mlp.up_proj.qweight" in str(caught.value)
    assert "model.layers.2.mlp.up_proj.weight is [3, 5] instead of [48, 32]" in str(caught.value)


class FakeReference:
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._weights


def test_unknown_activation_and_encoder_are_refused(tiny):
    with pytest.raises(CheckpointError, match="hidden_act = 'relu'"):
        tiny("LlamaForCausalLM", hidden_act="relu").harness()
    with pytest.raises(CheckpointError, match="use_bidirectional_attention"):
        tiny("Gemma3ForCausalLM", use_bidirectional_attention=True).harness()
