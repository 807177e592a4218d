"""Bad packages: what the list and a start say about each, and that a start which does not select them works.

What `interlace plugins doctor` says about each is in tests/cli/test_cli_plugins_doctor.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from interlace import LLM, cli
from interlace.errors import InterlaceError, PluginContractError, PluginImportError, PluginOptionsError

TINY = {"cache": {"memory": "64MiB"}, "max_model_len": 128}


def listed(capsys) -> dict[tuple[str, str], dict[str, str]]:
    assert cli.main(["plugins", "list", "--json"]) == 0
    return {(row["package"], row["name"]): row for row in json.loads(capsys.readouterr().out)}


def refusal(**settings) -> InterlaceError:
    """The error of a start."""
    with pytest.raises(InterlaceError) as caught:
        LLM(**TINY, **settings)
    return caught.value


# ── Packages that cannot be loaded: nothing of them can be selected ─────────────────────────────────────────────

UNLOADABLE = [
    ("broken", "0.1", "ImportError: libfast.so.3 is missing", ImportError),
    ("lost", "0.5", "ModuleNotFoundError: No module named 'interlace_lost_module'", ModuleNotFoundError),
    ("raising", "0.4", "OSError: the licence server does not answer", OSError),
]


@pytest.mark.parametrize(("package", "version", "reason", "cause"), UNLOADABLE)
def test_package_that_cannot_be_loaded(capsys, install, caplog, package, version, reason, cause):
    install(package)
    with caplog.at_level("WARNING", logger="interlace.plugin_manager"):
        row = listed(capsys)[f"interlace-{package}", package]
    assert (row["state"], row["version"], row["summary"]) == ("broken", version, reason)
    failure = f"'{package}' of interlace-{package} {version} ({reason})"
    assert [record.getMessage() for record in caplog.records] == [f"plugin {failure} failed to load and is ignored"]
    error = refusal(scheduler={"use": package})
    assert str(error).startswith(f"no scheduler is called '{package}' (scheduler.use, constructor).")
    assert f"Plugins that failed to load: {failure}." in str(error)
    assert isinstance(error.__cause__, cause)


# ── Providers that show their fault when they are selected ──────────────────────────────────────────────────────

IMPORT, CONTRACT = PluginImportError, PluginContractError
FAULTS = [
    ("unimportable", IMPORT, "cannot be imported from 'interlace_demo_missing:Scheduler': ModuleNotFoundError: No mod"),
    ("nameless", IMPORT, "cannot be imported from 'interlace_demo_schedulers:NoSuchClass': AttributeError: module"),
    ("foreign", CONTRACT, "NotAScheduler'>, which is not a subclass of interlace.interfaces.scheduler.Scheduler"),
    ("incomplete", CONTRACT, "lacks plan of interlace.interfaces.scheduler.Scheduler (contract version 1): write it"),
    ("untyped", CONTRACT, "is <class 'dict'>, which is not a pydantic model"),
    ("old", CONTRACT, "speaks 1: it is too old. Upgrade interlace-demo, or install an older interlace"),
    ("new", CONTRACT, "speaks 1: it is too new. Upgrade interlace, or install an older interlace-demo"),
    ("undeclared", CONTRACT, "does not say which version of the schedulers contract it is written for"),
]
SEEN_WITHOUT_IMPORT = {"old", "new", "undeclared"}


@pytest.mark.parametrize(("name", "kind", "expected"), FAULTS)
def test_selected_provider_that_is_broken(install, name, kind, expected):
    install("demo")
    error = refusal(scheduler={"use": name})
    assert type(error) is kind and expected in str(error) and f"scheduler '{name}' (interlace-demo 1.2)" in str(error)


def test_what_the_list_says_of_broken_providers(capsys, install):
    """It imports none of them, so it knows only what their records say."""
    install("demo")
    rows = {name: row for (package, name), row in listed(capsys).items() if package == "interlace-demo"}
    broken = {name for name, row in rows.items() if row["state"] == "broken"}
    assert broken == SEEN_WITHOUT_IMPORT | {"odd"} and rows["undeclared"]["contract"] == "none"
    for name, _, expected in FAULTS:
        if name in SEEN_WITHOUT_IMPORT:
            assert expected in rows[name]["summary"]
    assert "interlace_demo_schedulers" not in sys.modules


def test_name_in_two_packages(capsys, install):
    install("demo", "rival")
    rows = listed(capsys)
    assert {rows[package, "twin"]["state"] for package in ("interlace-demo", "interlace-rival")} == {"available"}
    expected = (
        "the scheduler 'twin' (scheduler.use, constructor) is provided by interlace-demo 1.2 (entry point 'demo')"
    )
    error = str(refusal(scheduler={"use": "twin"}))
    assert error.startswith(expected) and "scheduler.use = 'interlace-rival:twin'" in error
    assert cli.main(["plugins", "list", "--json", "--scheduler.use", "twin"]) == 0
    rows = {(row["package"], row["name"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows["interlace-rival", "twin"]["state"] == "broken"
    assert "Select one by its qualified name" in rows["interlace-rival", "twin"]["summary"]


def test_misspelt_option(install):
    install("demo")
    error = refusal(scheduler={"use": "demo", "options": {"demo": {"windw": 3}}})
    assert type(error) is PluginOptionsError
    assert str(error) == (
        "scheduler.options.demo.windw (constructor): unknown option of scheduler 'demo' (interlace-demo 1.2). "
        "Did you mean 'scheduler.options.demo.window'? "
        "Options: window, tenants, log, token, weights.gold."
    )


# ── Whole starts ────────────────────────────────────────────────────────────────────────────────────────────────


def interlace(repo_root, fixtures: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(repo_root / "tests" / "fixtures" / name) for name in fixtures]
    command = [sys.executable, "-c", "import sys; from interlace.cli import main; sys.exit(main())", *arguments]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_start_beside_every_bad_package(repo_root):
    """One warning line for each plugin that cannot be loaded; the rest is not even imported."""
    fixtures = ["broken", "lost", "raising", "misspelt", "demo", "rival", "twin", "worker", "careless", "heavy"]
    arguments = ["--prompt", "The capital of France is", "--max-tokens", "2", "--json", "--max-model-len", "128"]
    done = interlace(repo_root, fixtures, "generate", *arguments)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)[0]["outputs"][0]["token_ids"]) == 2
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    names = [line.split("'")[1] for line in warnings]
    assert names == ["broken", "lost", "schedulres", "stepp", "unmarked", "raising"]
    assert all(line.endswith(" failed to load and is ignored") for line in warnings)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("unimportable", IMPORT, "cannot be imported from 'interlace_worker_missing:Attention': ModuleNotFoundError"),
        ("foreign", CONTRACT, "Foreign'>, which is not a subclass of interlace.interfaces.attention.AttentionBackend"),
        ("incomplete", CONTRACT, "lacks cache_layout, forward, prepare of interlace.interfaces.attention.Attention"),
    ],
)
@pytest.mark.slow
def test_the_same_text_from_another_process(install, monkeypatch, name, kind, expected):
    """Attention is loaded by the worker: in this process, and in a child that reports to this one."""
    (folder,) = install("worker")
    monkeypatch.setenv("PYTHONPATH", folder)
    texts = set()
    for process in ("inline", "subprocess"):
        error = refusal(attention={"use": name}, engine={"process": process})
        assert type(error) is kind and expected in str(error)
        assert error.__cause__ is not None or kind is CONTRACT
        texts.add(str(error))
    assert len(texts) == 1 and texts.pop().startswith(f"attention backend '{name}' (interlace-worker 0.9)")
