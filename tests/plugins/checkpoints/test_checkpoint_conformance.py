"""The conformance suite of checkpoint formats: all built-in ones pass it, formats that are wrong on purpose do not."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
from safetensors.torch import save_file

from interlace.plugins.checkpoints.dummy import DummyCheckpoint, byte_tokenizer
from interlace.testing.checkpoint_suite import CheckpointConformance

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


class Dummy(CheckpointConformance):
    checkpoint = "dummy"
    is_found = False
    options: ClassVar = {"seed": 3}

    def write(self, folder):
        (folder / "config.json").write_text(json.dumps(CONFIG))
        return folder


class Safetensors(CheckpointConformance):
    checkpoint = "safetensors"

    def write(self, folder):
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 5]}))
        byte_tokenizer("tiny").backend.save(str(folder / "tokenizer.json"))
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": "{{ messages }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
        weights = list(DummyCheckpoint(DummyCheckpoint.Options(), folder / "config.json").weights())
        self.save(folder, dict(weights))
        return folder

    def save(self, folder, weights):
        save_file(weights, folder / "model.safetensors")


class Sharded(Safetensors):
    def save(self, folder, weights):
        placed = {}
        for number, names in enumerate((list(weights)[:9], list(weights)[9:]), start=1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: weights[name] for name in names}, folder / shard)
            placed |= dict.fromkeys(names, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


class Gguf(CheckpointConformance):
    checkpoint = "gguf"
    architecture = "llama"
    metadata: ClassVar = {"tokenizer.chat_template": "{{ messages[0]['content'] }}", "general.name": "tiny"}

    @pytest.fixture(autouse=True)
    def _writer(self, gguf_writer):
        self.writer = gguf_writer

    def write(self, folder):
        return self.writer(folder / "tiny.gguf", self.architecture, kind="Q4_0", metadata=self.metadata)


class TestDummy(Dummy):
    seeds = range(10)


class TestSafetensors(Safetensors):
    seeds = range(10)


class TestShardedSafetensors(Sharded):
    seeds = range(6)


class TestGguf(Gguf):
    seeds = range(10)
