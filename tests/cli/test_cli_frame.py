"""The frame of the command line: flags, errors, exit codes, and how little it loads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from interlace import __version__, cli
from interlace.cli.flags import split_settings
from interlace.cli.parser import UsageError
from interlace.config import all_settings
from interlace.errors import ConfigError


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_command(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(f"    {command} " in out and summary in out for command, summary in cli.COMMANDS.items())
    assert run(capsys)[1] == out


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"interlace {__version__}\n")


def test_every_command_has_a_module():
    for command in cli.COMMANDS:
        assert importlib.util.find_spec(f"interlace.cli.{command}"), command


@pytest.mark.parametrize("words", [["config", "--help"], ["config", "explain", "-h"], ["plugins", "list", "--help"]])
def test_help_of_a_command(capsys, words):
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "interlace " + " ".join(words[:-1]) in out and "--config FILE" in out and "by its dotted path" in out


def test_the_help_of_serve_lists_its_settings(capsys):
    code, out, _ = run(capsys, "serve", "--help")
    assert code == 0 and "  --server.port 8000\n        TCP port to listen on" in out
    keys = [setting.key for setting in all_settings() if setting.key.startswith("server.")]
    assert len(keys) > 20 and all(f"  --{key}" in out for key in keys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "smollm2"], "unexpected argument 'smollm2'. If that is the model: --model smollm2. See interlace"),
        (["confg"], "unknown command 'confg'. Did you mean 'config'? Commands: "),
        (["--scheduler.use=fcfs"], "a command is missing before '--scheduler.use=fcfs'"),
        (["config", "--jsn"], "unknown flag '--jsn'. Did you mean '--json'? See interlace config --help"),
        (["config", "--max-num-seqs", "3"], "Did you mean '--scheduler.max_num_seqs'?"),
        (["config", "--sede=3"], "unknown flag '--sede'. Did you mean '--seed'?"),
        (["config", "explain"], "the following arguments are required: KEY"),
        (["config", "explain", "seed", "extra"], "unexpected argument 'extra'"),
        (["plugins", "lst"], "invalid choice: 'lst'"),
        (["config", "--seed"], "--seed needs a value (integer, at least 0"),
        (["config", "--scheduler.use", "--json"], "--scheduler.use needs a value"),
        (
            ["config", "--schedulr.use", "x"],
            "unknown setting 'schedulr.use' (command line). Did you mean 'scheduler.use'",
        ),
        (["config", "--config", "/nowhere.toml"], "configuration file '/nowhere.toml' does not exist"),
    ],
)
def test_mistakes_are_one_message_and_code_2(capsys, arguments, expected):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("interlace: error: ") and expected in err and "Traceback" not in err


def test_debug_adds_the_traceback(capsys, monkeypatch):
    assert "Traceback" in run(capsys, "config", "explain", "sede", "--debug")[2]
    monkeypatch.setenv("INTERLACE_DEBUG", "1")
    assert "Traceback" in run(capsys, "config", "explain", "sede")[2]


def test_interrupt_and_other_errors(capsys, monkeypatch):
    from interlace.cli import config

    def interrupt(args, loaded):
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "run", interrupt)
    assert run(capsys, "config")[0] == 130

    def bug(args, loaded):
        raise ZeroDivisionError

    monkeypatch.setattr(config, "run", bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(["config"])


@pytest.mark.parametrize(
    ("words", "rest", "settings"),
    [
        (["--scheduler.use", "fcfs", "key"], ["key"], {"scheduler.use": "fcfs"}),
        (["--scheduler.use=fcfs", "--max-model-len", "9"], [], {"scheduler.use": "fcfs", "max_model_len": "9"}),
        (["--deterministic", "key"], ["key"], {"deterministic": "true"}),
        (["--deterministic", "off", "key"], ["key"], {"deterministic": "off"}),
        (["--cache.prefix-caching=false"], [], {"cache.prefix_caching": "false"}),
        (["--scheduler.options.my-plugin.flag", "--json"], ["--json"], {"scheduler.options.my-plugin.flag": "true"}),
        (["--scheduler.options.p.x", "-3"], [], {"scheduler.options.p.x": "-3"}),
        (["--scheduler", '{"use": "x"}'], [], {"scheduler": '{"use": "x"}'}),
        (["--prompt", "--", "--seed", "3"], ["--prompt", "--", "--seed", "3"], {}),
        (["--seed", "1", "--seed", "2"], [], {"seed": "2"}),
        (["--debug", "a.b", "--max-tokens", "4"], ["a.b", "--max-tokens", "4"], {}),
    ],
)
def test_settings_are_told_from_the_commands_own_words(words, rest, settings):
    assert split_settings(words) == (rest, settings, None)
    assert split_settings([*words[:0], "--config", "a.toml", *words]) == (rest, settings, "a.toml")


def test_flag_at_the_end_without_value():
    with pytest.raises(UsageError, match="--model needs a value"):
        split_settings(["--model"])
    assert not issubclass(UsageError, ConfigError)


def test_reader_of_a_pipe_may_leave():
    command = f"{sys.executable} -c \"from interlace.cli import main; raise SystemExit(main(['config']))\" | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("KEY") and done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["config"],
        ["config", "--json", "--scheduler.use", "priority"],
        ["config", "explain", "scheduler.options.priority.aging_s"],
        ["plugins", "list", "--json"],
        ["models"],
    ],
    ids=" ".join,
)
def test_commands_that_show_things_load_nothing_heavy(arguments):
    code = (
        "import json, sys; from interlace.cli import main; code = main(json.loads(sys.argv[1])); "
        "heavy = [m for m in ('torch', 'transformers', 'triton') if m in sys.modules]; "
        "print(code, heavy, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines()[-1] == "0 []" and done.stdout
