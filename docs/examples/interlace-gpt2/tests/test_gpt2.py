"""GPT-2 against transformers, on tiny checkpoints with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from interlace import LLM, SamplingParams
from interlace.errors import CheckpointError
from interlace.model_config import ModelConfig
from interlace.testing.model_harness import ModelHarness
from interlace.testing.parity import Agreement, agreement, transformers_greedy
from interlace.testing.reference import ReferenceAttention
from safetensors.torch import load_file, save_file

from interlace_gpt2.config import standard_config
from interlace_gpt2.model import GPT2LMHeadModel

TINY = {
    "vocab_size": 258,
    "n_positions": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 257,
    "eos_token_id": 257,
    "initializer_range": 0.3,  # large, so that attention patterns and logits differ visibly
}
PROMPT = torch.randint(0, 256, (41,), generator=torch.Generator().manual_seed(7)).tolist()


def make_reference(**changes: Any) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(1)
    config = transformers.GPT2Config(**TINY | changes, architectures=["GPT2LMHeadModel"])
    config._attn_implementation = "eager"
    reference = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "ln_" in name or name.endswith("bias"):  # ones and zeros at first, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return reference


def make_harness(reference: Any, weights: Iterable[tuple[str, torch.Tensor]] | None = None) -> ModelHarness:
    raw = reference.config.to_dict()
    config = ModelConfig.from_hf({**raw, **standard_config(raw)}, "test")
    given = reference.state_dict().items() if weights is None else weights
    return ModelHarness(GPT2LMHeadModel, config, given, attention=ReferenceAttention)


@torch.inference_mode()
def reference_logits(reference: Any) -> torch.Tensor:
    return reference(torch.tensor([PROMPT]), use_cache=False).logits[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": 40, "layer_norm_epsilon": 1e-3},
        {"activation_function": "gelu"},
        {"scale_attn_weights": False},
        {"tie_word_embeddings": False},
    ],
)
def test_logits_are_those_of_transformers(changes: dict[str, Any]):
    reference = make_reference(**changes)
    logits = make_harness(reference).run(PROMPT)
    assert torch.allclose(logits, reference_logits(reference), atol=1e-4, rtol=0)


def test_a_checkpoint_of_the_bare_body_with_masks_loads_too():
    """As the first GPT-2 checkpoints are: no prefix, no head, and the causal mask among the weights."""
    reference = make_reference()
    old = dict(reference.transformer.state_dict())
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 96, 96).tril() for layer in range(3)}
    logits = make_harness(reference, old.items()).run(PROMPT)
    assert torch.allclose(logits, reference_logits(reference), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
        ({"activation_function": "relu"}, "activation_function = 'relu' is not supported; known: gelu_new"),
    ],
)
def test_variants_that_are_not_supported_are_said(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        make_harness(make_reference(**changes))


def write_checkpoint(folder: Path, reference: Any) -> None:
    """As a model of the hub lies on disk: config.json, tokenizer.json, model.safetensors."""
    reference.save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, "<unused>", "<|endoftext|>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_greedy_text_of_a_checkpoint_is_that_of_transformers(tmp_path: Path):
    reference = make_reference()
    write_checkpoint(tmp_path, reference)
    prompts = [PROMPT, PROMPT[:9], PROMPT[20:23]]
    params = SamplingParams(temperature=0.0, max_tokens=40)
    with LLM(str(tmp_path), dtype="float32", cache={"memory": "16MiB"}) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        assert llm.generate("Hello", params)[0].outputs[0].text
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = transformers_greedy(reference, prompt, 40, [TINY["eos_token_id"]])
        assert agreement(expected, output.outputs[0].token_ids)[0] is Agreement.EQUAL


def test_a_configuration_without_its_numbers_is_explained(tmp_path: Path):
    write_checkpoint(tmp_path, make_reference())
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["n_layer"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"'GPT2LMHeadModel' \(interlace-gpt2 .*KeyError: 'n_layer'"):
        LLM(str(tmp_path))


def test_half_precision_checkpoints_load(tmp_path: Path):
    write_checkpoint(tmp_path, make_reference())
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with LLM(str(tmp_path), dtype="float32", cache={"memory": "16MiB"}) as llm:
        output = llm.generate("Hello", SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert len(output[0].outputs[0].token_ids) == 8
