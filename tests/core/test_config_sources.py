"""Where settings come from, which source wins, and how texts take the type of their key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interlace.catalog import DEFAULT_MODEL
from interlace.config import OTHER_VARIABLES, Settings, all_settings, effective, load_settings, parse_memory

TOML = """
seed = 1
model = "from-file"
[scheduler]
use = "file"
max_num_seqs = 11
[scheduler.options.priority]
aging_s = 5
other = "kept"
"""
YAML = """
seed: 1
model: from-file
scheduler:
  use: file
  max_num_seqs: 11
  options:
    priority: {aging_s: 5, other: kept}
"""


@pytest.fixture(params=["engine.toml", "engine.yaml", "engine.yml"])
def config_file(request, tmp_path) -> Path:
    path = tmp_path / request.param
    path.write_text(TOML if path.suffix == ".toml" else YAML)
    return path


def test_defaults_need_no_source():
    loaded = load_settings(env={})
    assert loaded.settings == Settings()
    assert set(loaded.sources.values()) == {"default"}
    assert loaded.settings.model == DEFAULT_MODEL


def test_stronger_sources_win_key_by_key(config_file):
    loaded = load_settings(
        {"scheduler": {"use": "constructor"}},
        {"scheduler.use": "flag", "seed": "3"},
        config_file,
        {
            "INTERLACE_SCHEDULER__USE": "variable",
            "INTERLACE_SEED": "2",
            "INTERLACE_CACHE__BLOCK_SIZE": "16",
            "INTERLACE_SCHEDULER__OPTIONS__PRIORITY__AGING_S": "30",
        },
    )
    settings = loaded.settings
    assert (settings.scheduler.use, settings.seed, settings.cache.block_size) == ("constructor", 3, 16)
    assert (settings.model, settings.scheduler.max_num_seqs) == ("from-file", 11)
    assert settings.scheduler.options == {"priority": {"aging_s": "30", "other": "kept"}}
    assert {key: loaded.source(key) for key in ("scheduler.use", "seed", "cache.block_size", "model", "dtype")} == {
        "scheduler.use": "constructor",
        "seed": "command line",
        "cache.block_size": "environment INTERLACE_CACHE__BLOCK_SIZE",
        "model": f"file {config_file.name}",
        "dtype": "default",
    }
    assert loaded.source("scheduler.options.priority.other") == f"file {config_file.name}"
    assert loaded.source("scheduler.options.priority.aging_s").startswith("environment ")


def test_constructor_takes_dotted_keys_models_and_paths(tmp_path):
    scheduler = load_settings({"scheduler.max_num_seqs": 4}, env={}).settings.scheduler
    loaded = load_settings({"scheduler": scheduler, "cache.memory": 0.25, "model": tmp_path}, env={})
    assert loaded.settings.scheduler.max_num_seqs == 4
    assert loaded.settings.model == str(tmp_path)
    assert "scheduler.use" in loaded.sources and loaded.source("scheduler.use") == "default"


def test_config_variable_names_the_file(config_file):
    assert load_settings(env={"INTERLACE_CONFIG": str(config_file)}).settings.seed == 1
    assert load_settings(config_file=config_file, env={"INTERLACE_CONFIG": "/nowhere.toml"}).settings.seed == 1


def test_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("INTERLACE_SEED", "77")
    assert load_settings().settings.seed == 77
    assert load_settings(env={}).settings.seed is None
    assert Settings().seed is None


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("seed", "none", None),
        ("deterministic", "true", True),
        ("deterministic", "off", False),
        ("scheduler.watermark", "0.5", 0.5),
        ("plugins.block", "a, b", ["a", "b"]),
        ("plugins.block", '["a,b"]', ["a,b"]),
        ("scheduler.options", '{"priority": {"aging_s": 3}}', {"priority": {"aging_s": 3}}),
        ("cache.memory", "2GiB", "2GiB"),
        ("model", "123", "123"),
    ],
)
def test_texts_take_the_type_of_their_key(key, text, value):
    from_flag = effective(load_settings(cli={key: text}, env={}))
    variable = next(setting.variable for setting in all_settings() if setting.key == key)
    from_variable = effective(load_settings(env={variable: text}))
    for settings in (from_flag, from_variable):
        for part in key.split("."):
            settings = settings[part]
        assert settings == value


def test_whole_table_as_json_merges_with_the_rest():
    loaded = load_settings(cli={"scheduler": '{"use": "x", "max_num_seqs": 3}', "scheduler.use": "y"}, env={})
    assert (loaded.settings.scheduler.use, loaded.settings.scheduler.max_num_seqs) == ("y", 3)


def test_empty_variables_count_as_unset():
    assert load_settings(env={"INTERLACE_SEED": "", "INTERLACE_DEBUG": "1"}).settings == Settings()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2GiB", 2 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        ("4096", 4096),
        ("0.4", 0.4),
        ("40%", 0.4),
        ("1.0", 1.0),
    ],
)
def test_memory_sizes_and_shares(text, value):
    assert parse_memory(text) == value
    assert type(parse_memory(text)) is type(value)


@pytest.mark.parametrize("text", ["", "2Gb", "150%", "0%", "0.0", "1.5", "-1", "0", "GiB"])
def test_memory_that_means_nothing(text):
    with pytest.raises(ValueError, match="2GiB"):
        parse_memory(text)


def test_two_loads_do_not_share_anything():
    first, second = load_settings({"seed": 1}, env={}), load_settings({"scheduler.options.x.y": 2}, env={})
    assert first.settings.scheduler.options == {} and second.settings.seed is None


def test_secrets_are_masked():
    loaded = load_settings({"server": {"api_keys": ["top-secret"]}}, env={})
    assert loaded.settings.server.api_keys[0].get_secret_value() == "top-secret"
    assert "top-secret" not in repr(loaded) + json.dumps(effective(loaded))


def test_every_setting_is_described_and_bounded():
    for setting in all_settings():
        assert len(setting.description) > 15, setting.key
        assert setting.type not in ("", "any value"), setting.key
        if setting.type.startswith(("integer", "number")):
            assert "at least" in setting.type or "above" in setting.type, setting.key
    assert not {setting.variable for setting in all_settings()} & set(OTHER_VARIABLES)
