"""GGUF weights arrive as Hugging Face has them."""

from __future__ import annotations

import functools

import gguf
import numpy as np
import pytest
import torch

from interlace.errors import CheckpointError
from interlace.interfaces.weights import BlockWeight, decode_all, join_rows
from interlace.plugins.checkpoints.gguf import GgufCheckpoint
from interlace.plugins.checkpoints.gguf_blocks import FORMATS, decode
from interlace.plugins.checkpoints.gguf_config import FAMILIES, hf_name


def load(path):
    checkpoint = GgufCheckpoint(GgufCheckpoint.Options(), path)
    weights = dict(decode_all(checkpoint.weights()))
    assert len(weights) == checkpoint.num_weights()
    return checkpoint, weights


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_family_comes_back_as_it_was(tiny_gguf, tiny_weights, arch):
    checkpoint, weights = load(tiny_gguf(arch=arch))
    expected = tiny_weights(arch)
    assert len(weights) == len(expected)
    for name, array in expected.items():
        torch.testing.assert_close(weights[hf_name(FAMILIES[arch], name)], torch.from_numpy(array))
    assert checkpoint.config().tie_word_embeddings is False


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_names_and_shapes_are_those_of_transformers(tiny_gguf, arch):
    import transformers

    checkpoint, weights = load(tiny_gguf(arch=arch))
    config = checkpoint.config()
    reference_config = getattr(
        transformers, config.architecture.replace("ForCausalLM", "Config").replace("Gemma3Config", "Gemma3TextConfig")
    )(**{k: v for k, v in config.raw.items() if k != "architectures"})
    with torch.device("meta"):
        reference = getattr(transformers, config.architecture)(reference_config)
    assert {n: tuple(w.shape) for n, w in weights.items()} == {
        n: tuple(w.shape) for n, w in reference.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_round_trip_of_each_type(tiny_gguf, tiny_weights, kind):
    checkpoint, weights = load(tiny_gguf(kind=kind))
    source = torch.from_numpy(tiny_weights("llama")["blk.0.ffn_up.weight"])
    found = weights["model.layers.0.mlp.up_proj.weight"]
    step = {"F16": 2e-3, "BF16": 2e-2, "Q8_0": 0.03, "Q5_0": 0.25, "Q5_1": 0.25, "Q4_0": 0.5, "Q4_1": 0.5}[kind]
    assert (found.float() - source).abs().max() < step
    quantised = gguf.quants.quantize(source.numpy(), gguf.GGMLQuantizationType[kind])
    exact = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType[kind])
    torch.testing.assert_close(found.float(), torch.from_numpy(exact), rtol=0, atol=0)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert found.dtype == dtype
    assert checkpoint.config().dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_have_the_values_of_the_gguf_library(kind):
    """Bit for bit, whatever the bytes: infinite scales, denormals, more rows than are decoded at a time."""
    values, nbytes, _ = FORMATS[kind]
    rows = np.random.default_rng(5).integers(0, 256, (700, 512 // values * nbytes), dtype=np.uint8)
    rows[0] = 0
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    found = decode(kind, torch.from_numpy(rows)).numpy()
    numbers = ~np.isnan(expected)
    assert np.array_equal(numbers, ~np.isnan(found)) and numbers.mean() > 0.5
    assert np.array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert not found[0].any(), "padding with zero bytes must be padding with zeros"


def test_blocks_are_cut_padded_and_joined():
    rng = np.random.default_rng(6)
    blocks = gguf.quants.quantize(rng.standard_normal((6, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    weight = BlockWeight("Q8_0", (6, 64), torch.from_numpy(blocks), functools.partial(decode, "Q8_0"))
    whole = weight.dequantize()
    assert torch.equal(weight[2:5].dequantize(), whole[2:5]) and weight[2:5].shape == (3, 64)
    assert torch.equal(weight[[5, 0]].dequantize(), whole[[5, 0]])
    assert torch.equal(weight[:, 16:40], whole[:, 16:40]), "blocks cannot be cut: columns come as values"
    assert isinstance(weight[1:3, 0:64], BlockWeight), "all columns are no cut"
    assert torch.equal(weight.pad(8).dequantize(), torch.cat((whole, torch.zeros(2, 64))))
    assert torch.equal(weight.dequantize(torch.bfloat16), whole.bfloat16())
    joined = join_rows([weight[:2], torch.ones(1, 64), weight[2:]], torch.bfloat16, "cpu")
    assert torch.equal(joined, torch.cat((whole[:2], torch.ones(1, 64), whole[2:])).bfloat16())


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q8_0"])
def test_blocks_mean_what_another_implementation_reads(tmp_path, kind):
    """The library cannot make k-quants, so random blocks are compared with transformers' own dequantiser."""
    from transformers.integrations.gguf.dequant import dequantize

    from interlace.plugins.checkpoints.gguf_reader import BLOCKS

    number = next(number for number, entry in BLOCKS.items() if entry[0] == kind)
    _, block_values, block_bytes = BLOCKS[number]
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (8 * 512 // block_values, block_bytes), dtype=np.uint8)
    scales = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q4_1": [0, 2]}.get(kind, [0])
    for offset in scales:
        blocks[:, offset : offset + 2] = rng.uniform(0.01, 1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    found = decode(kind, torch.from_numpy(blocks.reshape(8, -1)))
    expected = dequantize(torch.from_numpy(blocks), number).reshape(8, 512)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_shards_are_read_as_one(tiny_gguf, tmp_path, tiny_weights):
    path = tiny_gguf(split_max_tensors=8, name="model.gguf")
    first = sorted(tmp_path.glob("model-*.gguf"))[0]
    assert first.name.startswith("model-00001-of-") and not path.exists()
    _, weights = load(first)
    assert len(weights) == len(tiny_weights("llama"))
    sorted(tmp_path.glob("model-*.gguf"))[1].unlink()
    with pytest.raises(CheckpointError, match="model-00002-of"):
        load(first)


def test_unknown_tensor_is_refused(tiny_gguf, tiny_weights):
    weights = tiny_weights("llama") | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_sinks\.weight.*LlamaForCausalLM"):
        load(tiny_gguf(weights=weights))


def test_heads_that_do_not_divide_the_rows(tiny_gguf):
    with pytest.raises(CheckpointError, match=r"attn_q\.weight.*7 heads"):
        load(tiny_gguf(metadata={"llama.attention.head_count": 7}))


def test_smollm2_has_the_weights_of_its_architecture(smollm2_path):
    checkpoint = GgufCheckpoint(GgufCheckpoint.Options(), smollm2_path)
    assert checkpoint.num_weights() == 272
    name, blocks = next(iter(checkpoint.weights()))
    assert isinstance(blocks, BlockWeight) and blocks.format == "Q8_0"
    embedding = blocks.dequantize()
    assert name == "model.embed_tokens.weight" and embedding.shape == (49152, 576)
    assert embedding.dtype == torch.float32 and 0.01 < embedding.std() < 1


def compare_with_transformers(path):
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    count = 0
    for name, tensor in decode_all(GgufCheckpoint(GgufCheckpoint.Options(), path).weights()):
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
        count += 1
    assert set(reference) - {"lm_head.weight"} == {
        n for n, _ in GgufCheckpoint(GgufCheckpoint.Options(), path).weights()
    }
    return count


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_equals_transformers(smollm2_path):
    assert compare_with_transformers(smollm2_path) == 272


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gemma3_equals_transformers(gemma3_path):
    assert compare_with_transformers(gemma3_path) == 236
