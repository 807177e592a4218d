"""A recorded step gives what the same ops give one by one, and what transformers gives; and what cannot be recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from interlace.interfaces.kernels import KernelSpec
from interlace.model_config import ModelConfig
from interlace.plugins.attention.native import NativeAttention
from interlace.plugins.attention.torch import TorchAttention
from interlace.plugins.kernels.native import NativeKernels
from interlace.plugins.models.gemma3 import Gemma3ForCausalLM
from interlace.plugins.models.llama import LlamaForCausalLM, MistralForCausalLM
from interlace.plugins.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM
from interlace.plugins.native.tape import NotRecordableError
from interlace.testing.model_harness import ModelHarness

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
MODELS = {
    "LlamaForCausalLM": (LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "MistralForCausalLM": (MistralForCausalLM, {"sliding_window": 8}),
    "Qwen2ForCausalLM": (Qwen2ForCausalLM, {}),
    "Qwen3ForCausalLM": (Qwen3ForCausalLM, {"tie_word_embeddings": True}),
    "Gemma3ForCausalLM": (Gemma3ForCausalLM, {"sliding_window": 8, "num_hidden_layers": 6}),
}


def make(architecture, **changes):
    torch.manual_seed(1)
    reference_class = getattr(transformers, architecture)
    config = reference_class.config_class(architectures=[architecture], **{**SHAPE, **changes})
    config._attn_implementation = "eager"
    return reference_class(config).eval()


def harness(architecture, reference, **settings):
    config = ModelConfig.from_hf(reference.config.to_dict(), "test")
    settings = {"attention": NativeAttention, "kernels": NativeKernels, "block_size": 16, "num_blocks": 64, **settings}
    return ModelHarness(MODELS[architecture][0], config, list(reference.state_dict().items()), **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_program_gives_the_bits_of_its_ops_and_the_logits_of_transformers(architecture, dtype):
    reference = make(architecture, **MODELS[architecture][1])
    whole, single = (harness(architecture, reference, dtype=dtype, program=program) for program in (True, False))
    prompts = {name: torch.randint(3, 97, (length,)).tolist() for name, length in (("a", 21), ("b", 1), ("c", 40))}
    first, same = whole.step(prompts), single.step(prompts)
    for name, tokens in prompts.items():
        assert torch.equal(first[name], same[name])
        if dtype == "float32":
            with torch.inference_mode():
                expected = reference(torch.tensor([tokens]), use_cache=False).logits[0]
            assert (first[name] - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    # Mixed batches of other sizes run the same recording.
    for batch in ({"b": [5], "d": prompts["c"][:33]}, {"a": [9], "b": [8], "c": [7], "d": [6]}, {"c": [4]}):
        first, same = whole.step(batch), single.step(batch)
        assert all(torch.equal(first[name], same[name]) for name in batch)


def test_how_a_prompt_is_cut_and_who_is_beside_it_changes_no_bit():
    reference = make("LlamaForCausalLM")
    whole = harness("LlamaForCausalLM", reference, dtype="bfloat16", program=True)
    prompt = torch.randint(3, 97, (50,)).tolist()
    alone = whole.run(prompt)
    for chunk in (1, 7, 16, 33):
        assert torch.equal(whole.run(prompt, chunk), alone)
    crowd = {f"other {i}": torch.randint(3, 97, (1 + i,)).tolist() for i in range(9)}
    assert torch.equal(whole.step({**crowd, "it": prompt})["it"], alone)


def test_outputs_choose_rows_and_may_be_none():
    reference = make("LlamaForCausalLM")
    one = harness("LlamaForCausalLM", reference, program=True)
    batch = one._pager.next_batch({"a": [3, 4, 5], "b": [6, 7]})
    with torch.inference_mode():
        hidden, logits = one._program.run(batch, range(5))
        hidden, logits = hidden.clone(), logits.clone()
        _, chosen = one._program.run(batch, [4, 2])
        assert torch.equal(chosen, logits[[4, 2]])
        best, values = one._program.peaks()
        assert best.tolist() == logits[[4, 2]].argmax(1).tolist() and values.tolist() == logits[[4, 2]].amax(1).tolist()
        same, (tokens, largest) = one._program.run_greedy(batch, [4, 2])
        assert torch.equal(same, hidden)
        assert tokens.tolist() == best.tolist() and largest.tolist() == values.tolist()
        again, none = one._program.run(batch, [])
        assert [len(part) for part in one._program.peaks()] == [0, 0]
    assert none.shape == (0, 97)
    assert torch.equal(again, hidden)


def test_profile_names_the_ops(monkeypatch):
    reference = make("Gemma3ForCausalLM", sliding_window=8)
    one = harness("Gemma3ForCausalLM", reference, program=True)
    batch = one._pager.next_batch({"a": [3, 4, 5]})
    seconds = one._program.profile(batch, [2])
    assert {"embedding", "scale", "rms_norm", "rope", "attention", "linear", "gated linear", "head"} <= set(seconds)
    assert all(value > 0 for value in seconds.values())


def test_attention_outside_the_library_is_a_reason():
    with pytest.raises(ValueError, match="attention runs on TorchAttention, outside the native kernels"):
        harness("LlamaForCausalLM", make("LlamaForCausalLM"), attention=TorchAttention, program=True)


def test_a_model_that_computes_in_torch_is_a_reason(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "embed", lambda self, ids: self._embedding(ids) * 2)
    with pytest.raises(ValueError, match="the model calls torch's mul between kernels"):
        harness("LlamaForCausalLM", make("LlamaForCausalLM"), program=True)


def test_a_recording_that_fails_leaves_the_kernels_usable():
    kernels = NativeKernels(NativeKernels.Options(), KernelSpec("float32", "cpu"))
    x = torch.randn(5, 8)
    expected = kernels.silu_mul(x)
    with pytest.raises(NotRecordableError), kernels._tape.recording(5, 3, []):
        kernels.silu_mul(x)
        x * 2
    assert not kernels._tape.is_recording
    assert torch.equal(kernels.silu_mul(x), expected)


def test_rows_that_no_step_has_are_a_reason():
    kernels = NativeKernels(NativeKernels.Options(), KernelSpec("float32", "cpu"))
    x = torch.zeros(4, 8)
    with pytest.raises(NotRecordableError, match="an op works on 4 rows"), kernels._tape.recording(5, 3, []):
        kernels.silu_mul(x)


def test_buffers_serve_again_once_nobody_holds_them():
    kernels = NativeKernels(NativeKernels.Options(), KernelSpec("float32", "cpu"))
    x = torch.zeros(5, 64)
    with kernels._tape.recording(5, 3, []):
        first = kernels.silu_mul(x)
        view, place = first[:, 8:], first.data_ptr()
        del first
        assert kernels.silu_mul(x).data_ptr() != place  # the view still reads it
        del view
        assert kernels.silu_mul(x).data_ptr() == place
