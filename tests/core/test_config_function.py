"""A model plugin says what the names in its configuration files mean (`Provider.config`)."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from interlace import Provider, hookimpl
from interlace.config import load_settings
from interlace.errors import CheckpointError, PluginImportError
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve

MODULE = "odd_model_config"
READER = f"{MODULE}:read"
RAW = {
    "architectures": ["OddForCausalLM"],
    "vocab_size": 300,
    "width": 16,
    "depth": 2,
    "heads": 4,
    "positions": 64,
}


def read(raw):
    return {
        "hidden_size": raw["width"],
        "intermediate_size": 4 * raw["width"],
        "num_hidden_layers": raw["depth"],
        "num_attention_heads": raw["heads"],
        "max_position_embeddings": raw["positions"],
    }


@pytest.fixture
def resolved(tmp_path, monkeypatch):
    """Resolve a configuration in odd names, `changes` made, with a model plugin that names `function` as its reader."""

    def make(function: str | None, **changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({key: value for key, value in (RAW | changes).items() if value is not None}))

        class Plugin:
            @hookimpl
            def interlace_models(self):
                yield Provider(name="OddForCausalLM", target="never.imported:Odd", config=function, api="1")

        loaded = load_settings({"model": str(path), "checkpoint.use": "dummy", "device": "cpu"}, env={})
        return resolve(loaded, PluginManager(loaded.settings, [Plugin()])).model_config

    module = ModuleType(MODULE)
    module.read = read
    monkeypatch.setitem(sys.modules, MODULE, module)
    return make


def test_names_are_translated_and_the_others_kept(resolved):
    config = resolved(READER)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (16, 64, 2)
    assert (config.num_heads, config.head_size, config.max_position_embeddings) == (4, 4, 64)
    assert config.raw["width"] == 16 and config.architecture == "OddForCausalLM"


def test_without_a_reader_the_first_missing_name_is_named(resolved):
    with pytest.raises(CheckpointError, match=r"config\.json: the model configuration lacks 'num_attention_heads'"):
        resolved(None)


def test_what_the_reader_misses_names_file_plugin_and_cause(resolved):
    with pytest.raises(CheckpointError, match=r"config\.json: model architecture 'OddForCausalLM' .*KeyError: 'depth'"):
        resolved(READER, depth=None)


def test_numbers_of_a_reader_are_checked(resolved):
    with pytest.raises(CheckpointError, match="num_layers is 0, it must be positive"):
        resolved(READER, depth=0)


def test_a_reader_that_cannot_be_imported_is_said(resolved):
    with pytest.raises(PluginImportError, match="the config function of model architecture 'OddForCausalLM'"):
        resolved("nowhere_at_all:read")


def test_a_configuration_must_name_its_architecture(resolved):
    with pytest.raises(CheckpointError, match=r"config\.json: the model configuration lacks 'architectures'"):
        resolved(READER, architectures=None)
