"""`interlace plugins show`: everything about one plugin, read in the lightest way there is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from interlace import cli
from interlace.contracts import CONTRACTS


def shown(capsys, name: str, *arguments: str, code: int = 0) -> dict:
    assert cli.main(["plugins", "show", name, "--json", *arguments]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys, name: str, *arguments: str) -> str:
    assert cli.main(["plugins", "show", name, *arguments]) == 2
    return capsys.readouterr().err


def test_options_with_types_defaults_ranges_and_descriptions(capsys, install):
    install("demo")
    card = shown(capsys, "demo")
    options = {option["key"]: option for option in card["options"]}
    assert options["scheduler.options.demo.window"] == {
        "key": "scheduler.options.demo.window",
        "type": "integer, at least 1, at most 64",
        "default": "8",
        "description": "How many requests to look at.",
    }
    assert options["scheduler.options.demo.weights.gold"]["default"] == "2.0"
    assert options["scheduler.options.demo.token"]["default"] == "***"


def test_origin_contract_and_processes(capsys, install):
    install("demo")
    card = shown(capsys, "demo", "--scheduler.use", "demo")
    assert (card["package"], card["version"], card["entry_point"]) == ("interlace-demo", "1.2", "demo")
    assert card["target"] == card["options_from"] == "interlace_demo_schedulers:Demo"
    assert (card["contract"], card["core_contract"]) == ("1", "1")
    assert card["interface"] == "interlace.interfaces.scheduler:Scheduler"
    assert card["processes"] == ["front", "engine core"] and card["state"] == "selected"
    assert card["select"] == 'scheduler.use = "demo"'


def test_every_built_in_can_be_shown(capsys):
    assert cli.main(["plugins", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in rows} == set(CONTRACTS)
    for row in rows:
        card = shown(capsys, f"{row['kind']}:{row['name']}")
        assert (card["kind"], card["name"], card["problem"]) == (row["kind"], row["name"], "")
        assert card["summary"] and card["processes"] and card["select"]


def test_arguments_of_a_logits_processor(capsys):
    (size,) = shown(capsys, "no_repeat_ngram")["arguments"]
    assert (size["key"], size["type"], size["default"]) == ("size", "integer, at least 1", "required")


def test_text(capsys):
    assert cli.main(["plugins", "show", "schedulers:priority"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("schedulers:priority  lower priority number first")
    assert 'select    scheduler.use = "priority"' in out
    assert "scheduler.options.priority.aging_s  number, at least 0" in out


@pytest.mark.parametrize("name", ["schedulers:twin", "twin"])
def test_two_packages_with_the_name(capsys, install, name):
    install("demo", "rival")
    error = refused(capsys, name)
    assert (
        f"'{name}' names 2 plugins; say which: interlace-demo:twin (interlace-demo 1.2), interlace-rival:twin" in error
    )
    card = shown(capsys, "interlace-rival:twin")
    assert card["package"] == "interlace-rival" and card["select"] == 'scheduler.use = "interlace-rival:twin"'
    assert shown(capsys, "schedulers:interlace-demo:twin")["package"] == "interlace-demo"


def test_two_kinds_with_the_name(capsys):
    error = refused(capsys, "torch")
    assert "'torch' names 2 plugins; say which: attention:torch (interlace " in error and ", kernels:torch (" in error


def test_unknown_name(capsys, install):
    install("broken")
    error = refused(capsys, "prioritty")
    assert "no plugin is called 'prioritty'. Did you mean 'priority'? Installed: " in error
    assert "Plugins that failed to load: 'broken' of interlace-broken 0.1 (ImportError: libfast.so.3" in error


@pytest.mark.parametrize("name", ["broken", "interlace-broken"])
def test_plugin_that_failed_to_load(capsys, install, name):
    install("broken")
    error = refused(capsys, name)
    assert "plugin 'broken' of interlace-broken 0.1 (ImportError: libfast.so.3 is missing) failed to load" in error
    assert "interlace plugins doctor" in error


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unimportable", "cannot be imported from 'interlace_demo_missing:Scheduler'"),
        ("incomplete", "lacks plan of interlace.interfaces.scheduler.Scheduler"),
        ("new", "it is too new"),
        ("untyped", "which is not a pydantic model"),
    ],
)
def test_broken_provider_is_shown_with_the_reason(capsys, install, name, expected):
    install("demo")
    card = shown(capsys, name, code=1)
    assert card["state"] == "broken" and expected in card["problem"] and card["package"] == "interlace-demo"
    assert cli.main(["plugins", "show", name]) == 1
    assert expected in capsys.readouterr().out


LIGHT = """
import io, json, sys
from interlace import cli
out, sys.stdout = sys.stdout, io.StringIO()
code = cli.main(["plugins", "show", *sys.argv[1:], "--json"])
card = json.loads(sys.stdout.getvalue())
json.dump([code, "torch" in sys.modules, card["loaded_torch"], len(card["options"])], out)
"""


@pytest.mark.parametrize("name", ["schedulers:priority", "attention:torch", "kernels:torch", "gguf", "attention:light"])
def test_options_are_read_without_torch(repo_root, name):
    """`attention:light` needs torch itself, and names an options model that does not."""
    code, torch, said, options = run_light(repo_root, name)
    assert (code, torch, said) == (0, False, False)
    assert options == (1 if name in ("schedulers:priority", "attention:light") else 0)


def test_loading_torch_is_said(repo_root):
    assert run_light(repo_root, "attention:heavy-options") == [0, True, True, 1]


def run_light(repo_root, name: str) -> list:
    paths = [str(repo_root / "tests" / "fixtures" / "light")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{LIGHT}"
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
