"""Wrong settings are errors that name key, source, what is allowed and the nearest match."""

from __future__ import annotations

import pytest

from interlace.config import load_settings
from interlace.errors import ConfigError


def refused(constructor=None, cli=None, file=None, env=None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(constructor, cli, file, env or {})
    assert caught.value.__cause__ is None or file is not None
    return str(caught.value)


@pytest.mark.parametrize(
    ("cli", "expected"),
    [
        ({"schedulr.use": "x"}, "unknown setting 'schedulr.use' (command line). Did you mean 'scheduler.use'?"),
        ({"scheduler.max_num_seq": "1"}, "Did you mean 'scheduler.max_num_seqs'? [scheduler] has: use, max_num_"),
        ({"max_num_seqs": "1"}, "Did you mean 'scheduler.max_num_seqs'?"),
        ({"modle": "x"}, "Did you mean 'model'? The top level has: model, dtype,"),
        ({"scheduler.max_num_seqs": "many"}, "scheduler.max_num_seqs = 'many' (command line): input should be a valid"),
        ({"scheduler.max_num_seqs": "0"}, "Allowed: integer, at least 1."),
        ({"scheduler.watermark": "1"}, "Allowed: number, at least 0.0, below 1.0."),
        ({"dtype": "fp16"}, "Allowed: one of auto, float32, bfloat16, float16."),
        ({"device": "gpu"}, "should be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"cache.memory": "lots"}, "should be a size such as '2GiB'"),
        ({"scheduler": "fcfs"}, "'scheduler' (command line) is a table and cannot be 'fcfs'. [scheduler] has: use,"),
        ({"scheduler.options.priority": "3"}, "'scheduler.options.priority' (command line) is a table"),
        ({"plugins.require": "a>>b"}, "'a>>b' is not a requirement such as"),
        ({"attention.auto_order": "[x"}, "attention.auto_order = '[x' (command line): input should be a valid list"),
    ],
)
def test_what_is_wrong_where_and_what_is_allowed(cli, expected):
    assert expected in refused(cli=cli)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("INTERLACE_SEDE", "unknown setting 'sede' (environment INTERLACE_SEDE). Did you mean INTERLACE_SEED?"),
        ("INTERLACE_SCHEDULER_USE", "Did you mean INTERLACE_SCHEDULER__USE?"),
        ("INTERLACE_SCHEDULER__MAX_SEQS", "unknown setting 'scheduler.max_seqs' (environment INTERLACE_SCHEDULER__"),
    ],
)
def test_misspelt_variables(variable, expected):
    assert expected in refused(env={variable: "1"})


def test_true_is_not_a_number():
    assert "seed = 'true' (constructor): true and false are not allowed here" in refused({"seed": True})
    assert "cache.memory = 'true'" in refused({"cache": {"memory": True}})


def test_all_mistakes_are_told_at_once():
    assert len(refused(cli={"seed": "x", "dtype": "y", "modle": "z"}).splitlines()) == 3


def test_a_strong_scalar_does_not_hide_behind_a_weak_table(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[scheduler]\nuse = 'fcfs'\n")
    assert "'scheduler' (constructor) is a table" in refused({"scheduler": "fcfs"}, file=file)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("bad.toml", "seed = 1\nmodel = \n", "bad.toml' is not valid TOML: Invalid value (at line 2, column 9)"),
        ("bad.yaml", "seed: 1\nmodel: [a\n", "bad.yaml' is not valid YAML: expected ',' or ']'"),
        ("list.yaml", "- seed\n", "should hold a table of settings"),
        ("word.yaml", "seed\n", "should hold a table of settings"),
        ("latin.toml", b"model = '\xff'\n", "latin.toml' cannot be read"),
        ("engine.json", "{}", "should end in .toml, .yaml or .yml"),
        ("typo.toml", "[scheduler]\nmax_num_seq = 3\n", "unknown setting 'scheduler.max_num_seq' (file typo.toml)."),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, expected):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refused(file=file)


def test_yaml_errors_name_the_line(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("seed: 1\nmodel: {a\n")
    assert "(at line 3, column 1)" in refused(file=file)


def test_missing_file(tmp_path):
    assert "does not exist" in refused(file=tmp_path / "none.toml")
    assert "does not exist" in refused(env={"INTERLACE_CONFIG": str(tmp_path / "none.toml")})


@pytest.mark.parametrize(
    "constructor",
    [
        {"server": {"api_keys": ["hunter2", 3]}},
        {"server": {"api_keys": {"hunter2": 1}}},
        {"server": {"api_key": "hunter2"}},
        {"server.api_keys": "hunter2"},
        {"server": {"api_keys": ["hunter2"]}, "seed": "x"},
    ],
)
def test_errors_never_print_keys(constructor):
    assert "hunter2" not in refused(constructor)
