"""Tiny checkpoints of known content."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from interlace.catalog import resolve_model

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
HEAD = HIDDEN // HEADS


@pytest.fixture(scope="session")
def gemma3_path():
    """The packaged Gemma 3 270M: `make test-slow` installs it, so its absence is a failure and not a skip."""
    return resolve_model("gemma3-270m").path


def random_weights(arch, seed=0, hidden=HIDDEN, inner=INNER, vocab=262):
    """Weights as Hugging Face has them: GGUF name → array."""
    rng = np.random.default_rng(seed)
    head = hidden // HEADS
    shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,), "output.weight": (vocab, hidden)}
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (HEADS * head, hidden),
            "attn_k.weight": (KV_HEADS * head, hidden),
            "attn_v.weight": (KV_HEADS * head, hidden),
            "attn_output.weight": (hidden, HEADS * head),
            "ffn_norm.weight": (hidden,),
            "ffn_gate.weight": (inner, hidden),
            "ffn_up.weight": (inner, hidden),
            "ffn_down.weight": (hidden, inner),
        }
        if arch == "qwen2":
            block |= {f"attn_{n}.bias": (h * head,) for n, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
        if arch in ("qwen3", "gemma3"):
            block |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
        if arch == "gemma3":
            block |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def permute(weight, heads):
    """What llama.cpp's converter does to query and key projections: halves of a head → interleaved rows."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def as_stored(arch, name, array):
    """A Hugging Face weight as the converter stores it."""
    if arch == "llama" and "attn_q.weight" in name:
        return permute(array, HEADS)
    if arch == "llama" and "attn_k.weight" in name:
        return permute(array, KV_HEADS)
    if arch == "gemma3" and name.endswith("norm.weight"):
        return array + 1
    return array


def write_gguf(path, arch="llama", weights=None, kind="F32", metadata=None, hidden=HIDDEN, inner=INNER, **writer):
    """Write a tiny model; matrices in type `kind`. `metadata` overrides keys; None removes one."""
    out = gguf.GGUFWriter(path, arch, **writer)
    special = ["<|bos|>", "<|eos|>", "<|im_end|>", "<think>"]
    values = {
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": hidden,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": inner,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 50000.0,
        f"{arch}.attention.sliding_window": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*BYTES, "ab", "cd", *special],
        "tokenizer.ggml.token_type": [1] * 258 + [3, 3, 3, 4],
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
    } | (metadata or {})
    for key, value in values.items():
        if isinstance(value, str):
            out.add_string(key, value)
        elif isinstance(value, bool):
            out.add_bool(key, value)
        elif isinstance(value, int):
            out.add_uint32(key, value)
        elif isinstance(value, float):
            out.add_float32(key, value)
        elif value is not None:
            out.add_array(key, value)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, array in (random_weights(arch, hidden=hidden, inner=inner) if weights is None else weights).items():
        stored = as_stored(arch, name, array)
        if kind != "F32" and array.ndim == 2 and not name.startswith("rope"):
            stored = gguf.quants.quantize(stored, quantized)
            out.add_tensor(name, stored, raw_dtype=quantized)
        else:
            out.add_tensor(name, stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path):
    """`tiny_gguf(**options of write_gguf)` → path."""
    return lambda name="tiny.gguf", **options: write_gguf(tmp_path / name, **options)


@pytest.fixture
def tiny_weights():
    """`random_weights`, with the names and values `tiny_gguf` uses when it is given none."""
    return random_weights


# A sentencepiece vocabulary; scores order the merges: "he" before "el", then "▁he", "llo", …
SPM = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "  ", "<turn>"]
SPM += ["he", "ll", "el", "\u2581he", "llo", "\u2581hello", "h", "e", "l", "o", "\u2581"]
SPM_METADATA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": SPM,
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [4, 4] + [1] * 11,
    "tokenizer.ggml.scores": [0.0] * 259 + [-1000.0] * 2 + [-float(rank) for rank in range(1, 12)],
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


@pytest.fixture
def spm_metadata():
    """Metadata that turn `tiny_gguf` into a model with a sentencepiece vocabulary (272 tokens)."""
    return dict(SPM_METADATA)


@pytest.fixture(scope="session", params=["llama with byte-level BPE", "gemma3 with sentencepiece"])
def gguf_bytes(request, tmp_path_factory):
    """An intact file, quantised, with everything a file can have: its bytes, and where its tensor data begins."""
    arch = request.param.split()[0]
    metadata = {"tokenizer.chat_template": "{{ messages[0]['content'] }}", "general.name": "tiny"}
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    if arch == "gemma3":
        weights = random_weights(arch, vocab=len(SPM))
        write_gguf(path, arch, weights, kind="Q4_0", metadata=metadata | SPM_METADATA)
    else:
        write_gguf(path, arch, kind="Q4_0", metadata=metadata)
    start = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
    return path.read_bytes(), int(start)


@pytest.fixture(scope="session")
def gguf_writer():
    """`write_gguf`, for suites that say themselves where to write."""
    return write_gguf
