"""`ModelConfig.from_hf` reads what transformers reads."""

from __future__ import annotations

import pytest

from interlace.errors import CheckpointError
from interlace.model_config import ModelConfig, read_json

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(**changes):
    return ModelConfig.from_hf({**BASE, **changes}, "config.json")


def test_defaults():
    config = read()
    assert (config.num_kv_heads, config.head_size, config.norm_eps) == (4, 16, 1e-6)
    assert config.rope == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.sliding_window, config.layer_types, config.dtype) == (0, (), "float32")
    assert config.eos_token_ids == () and not config.tie_word_embeddings


def test_tied_by_default_only_in_gemma():
    assert read(architectures=["Gemma3ForCausalLM"]).tie_word_embeddings
    assert not read(architectures=["Gemma3ForCausalLM"], tie_word_embeddings=False).tie_word_embeddings


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (7, (7,)), ([7, 8], (7, 8))])
def test_eos(eos, ids):
    assert read(eos_token_id=eos).eos_token_ids == ids


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}, "rope_theta": 9.0},
            {"rope_type": "default", "rope_theta": 3.0},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 9.0},
            {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0},
        ),
    ],
)
def test_rope_of_both_generations(changes, rope):
    assert read(**changes).rope == rope


def test_local_rope():
    older = read(rope_theta=1e6, rope_local_base_freq=1e4)
    assert older.local_rope == {"rope_type": "default", "rope_theta": 1e4}
    both = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}
    newer = read(rope_parameters=both)
    assert newer.rope["factor"] == 8.0 and newer.local_rope == {"rope_theta": 1e4}


@pytest.mark.parametrize(
    ("architecture", "changes", "window", "sliding"),
    [
        ("LlamaForCausalLM", {"sliding_window": 4}, 0, []),
        ("MistralForCausalLM", {"sliding_window": None}, 0, []),
        ("MistralForCausalLM", {"sliding_window": 4}, 4, list(range(8))),
        ("Qwen2ForCausalLM", {"sliding_window": 4}, 0, []),
        ("Qwen2ForCausalLM", {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 6}, 0, []),
        ("Qwen2ForCausalLM", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 6}, 4, [6, 7]),
        ("Qwen3ForCausalLM", {"sliding_window": 4, "use_sliding_window": True}, 0, []),
        ("Gemma3ForCausalLM", {"sliding_window": 4}, 4, [0, 1, 2, 3, 4, 6, 7]),
        ("Gemma3ForCausalLM", {"sliding_window": 4, "sliding_window_pattern": 2}, 4, [0, 2, 4, 6]),
        ("Gemma3ForCausalLM", {"sliding_window": 4, "layer_types": [SLIDING] + [FULL] * 7}, 4, [0]),
        ("OtherForCausalLM", {"sliding_window": 4, "layer_types": [FULL] * 8}, 0, []),
    ],
)
def test_windows(architecture, changes, window, sliding):
    config = read(architectures=[architecture], **changes)
    assert config.sliding_window == window
    assert [i for i, kind in enumerate(config.layer_types) if kind == SLIDING] == sliding
    assert len(config.layer_types) == (8 if sliding else 0)


@pytest.mark.parametrize("name", ["Gemma3Text", "Qwen2", "Qwen3", "Mistral", "Llama"])
def test_windows_are_those_of_transformers(name):
    import transformers

    numbers = {key: value for key, value in BASE.items() if key != "architectures"}
    reference = getattr(transformers, f"{name}Config")(**numbers, sliding_window=4)
    architecture = f"{name.removesuffix('Text')}ForCausalLM"
    config = ModelConfig.from_hf({**numbers, "architectures": [architecture], "sliding_window": 4}, "x")
    expected = getattr(reference, "layer_types", None) or [SLIDING if name == "Mistral" else FULL] * 8
    assert list(config.layer_types or [FULL] * 8) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": []}, "lacks 'architectures'"),
        ({"hidden_size": "x"}, r"config\.json: the model configuration is malformed"),
        ({"num_attention_heads": 0}, "malformed"),
        ({"num_hidden_layers": -1}, "num_layers is -1, it must be positive"),
        (
            {"sliding_window": 4, "architectures": ["M"], "layer_types": [FULL]},
            "layer_types has 1 entries for 8 layers",
        ),
        ({"rope_scaling": "linear"}, "malformed"),
    ],
)
def test_malformed(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


def test_missing_key():
    with pytest.raises(CheckpointError, match=r"config\.json: the model configuration lacks 'vocab_size'"):
        ModelConfig.from_hf({key: value for key, value in BASE.items() if key != "vocab_size"}, "config.json")


def test_read_json(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(CheckpointError, match=r"x\.json: the file is missing"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    for damaged in (b'{"a"', b"\xff", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"x\.json: not readable as JSON"):
            read_json(path)
