"""What single architectures do beyond their conformance suite (test_model_conformance.py), against transformers."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from interlace.errors import CheckpointError


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    # The largest logits of these checkpoints are about 30: relative to that, 1e-4 is 3e-6.
    assert (actual - expected).abs().max().item() < 1e-4


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


def test_tied_weights_may_be_shipped_twice(tiny, prompt):
    checkpoint = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    assert "lm_head.weight" in dict(checkpoint.weights())
    assert_close(checkpoint.harness().run(prompt), checkpoint.logits(prompt))


def test_attention_specs_need_no_weights(tiny):
    checkpoint = tiny("Gemma3ForCausalLM", num_hidden_layers=6, sliding_window=8, num_key_value_heads=1)
    specs = checkpoint.model.attention_specs(checkpoint.config, tensor_parallel=2)
    assert [(spec.kind, spec.window) for spec in specs] == [("window", 8)] * 5 + [("full", 0)]
    assert {(spec.num_heads, spec.num_kv_heads) for spec in specs} == {(2, 1)}


def test_unknown_activation_and_encoder_are_refused(tiny):
    with pytest.raises(CheckpointError, match="hidden_act = 'relu'"):
        tiny("LlamaForCausalLM", hidden_act="relu").harness()
    with pytest.raises(CheckpointError, match="use_bidirectional_attention"):
        tiny("Gemma3ForCausalLM", use_bidirectional_attention=True).harness()
