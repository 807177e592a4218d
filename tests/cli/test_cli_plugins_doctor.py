"""`interlace plugins doctor`: what a bad package does to its own process, and what is said about it here."""

from __future__ import annotations

import json
import os
import sys

import pytest

from interlace import cli
from interlace.cli import plugins_doctor
from interlace.cli.plugins_doctor import Diagnosis, diagnose, examine
from interlace.cli.plugins_probe import check_signatures
from interlace.config import PluginSettings, load_settings
from interlace.plugin_manager import find_installed
from interlace.plugins.models.llama import LlamaForCausalLM


def settings(**plugins) -> PluginSettings:
    return load_settings({"plugins": plugins}, env={}).settings.plugins


@pytest.fixture
def examined(install):
    """`examined("demo", "demo")` examines one entry point of one fixture package."""

    def examine_one(fixture: str, entry_point: str, timeout: float = 120.0):
        install(fixture)
        wanted = (f"interlace-{fixture}", entry_point)
        (plugin,) = [p for p in find_installed(settings()) if (p.origin.package, p.origin.entry_point) == wanted]
        return examine(plugin, timeout)

    return examine_one


def said(findings, subject: str) -> tuple[str, str]:
    """(text, cure) of the only finding about `subject`."""
    (finding,) = [finding for finding in findings if finding.subject == subject]
    return finding.text, finding.cure


def test_every_fault_of_a_provider(examined):
    found = examined("demo", "demo")
    assert found.state == "loaded" and found.discovery_ms is not None and found.discovery_ms < 5000
    subject = "scheduler '{}' (interlace-demo 1.2)".format
    healthy = {subject("demo"), subject("twin")}
    assert not healthy & {finding.subject for finding in found.findings}
    faults = {
        "unimportable": "cannot be imported from 'interlace_demo_missing:Scheduler': ModuleNotFoundError: No module",
        "nameless": "module 'interlace_demo_schedulers' has no attribute 'NoSuchClass'",
        "incomplete": "lacks plan of interlace.interfaces.scheduler.Scheduler (contract version 1): write it in class",
        "foreign": "NotAScheduler'>, which is not a subclass of interlace.interfaces.scheduler.Scheduler",
        "untyped": "is <class 'dict'>, which is not a pydantic model",
        "old": "is written for version 0 of the schedulers contract",
        "new": "is written for version 2 of the schedulers contract",
        "odd": "version '1.5'",
        "undeclared": "does not say which version of the schedulers contract it is written for",
    }
    assert len(found.findings) == len(faults)
    for name, expected in faults.items():
        text, cure = said(found.findings, subject(name))
        assert expected in text and "\n" not in text
        assert "pgrade" in cure, "each finding says what to do"
    assert said(found.findings, subject("new"))[1].startswith("Upgrade interlace, or install an older interlace-demo")


@pytest.mark.parametrize(
    ("fixture", "entry_point", "expected"),
    [
        ("broken", "broken", "fails to load: ImportError: libfast.so.3 is missing"),
        ("lost", "lost", "fails to load: ModuleNotFoundError: No module named 'interlace_lost_module'"),
        ("raising", "raising", "fails to load: OSError: the licence server does not answer"),
        ("misspelt", "stepp", "fails to load: PluginContractError: unknown hook 'on_stepp'. Did you mean 'on_step'?"),
        ("crashing", "exiting", "fails to load: SystemExit: no licence"),
    ],
)
def test_entry_points_that_do_not_load(examined, fixture, entry_point, expected):
    found = examined(fixture, entry_point)
    ((text, cure),) = [(finding.text, finding.cure) for finding in found.findings]
    assert found.state == "broken" and text.startswith(expected) and "\n" not in text
    assert f"plugins.block = ['interlace-{fixture}']" in cure


def test_code_that_takes_its_process_along_hides_nothing(examined, capfd):
    """Two of four providers end the process that imports them; the one after them is examined all the same."""
    found = examined("crashing", "crashing")
    assert [name for _, name in found.providers] == ["good-before", "aborts", "quits", "good-after"]
    findings = {finding.subject: finding for finding in found.findings}
    assert set(findings) == {f"scheduler '{name}' (interlace-crashing 0.7)" for name in ("aborts", "quits")}
    aborts = findings["scheduler 'aborts' (interlace-crashing 0.7)"]
    assert aborts.text.startswith("importing it crashes: the process was killed by signal 6 (SIGABRT)")
    assert "plugins.block = ['interlace-crashing:crashing']" in aborts.cure
    quits = findings["scheduler 'quits' (interlace-crashing 0.7)"]
    assert quits.text == "importing it crashes: the process ended with status 0"
    assert capfd.readouterr().out == "", "what a plugin prints stays in its process"


def test_hanging_plugin_is_ended(examined):
    found = examined("crashing", "hanging", timeout=5.0)
    assert found.state == "broken"
    assert said(found.findings, found.subject) == (
        "loading it did not end within 5 s",
        "Keep it out: plugins.block = ['interlace-crashing:hanging'], and tell its authors",
    )


def test_torch_at_discovery_is_slow_with_its_milliseconds(examined):
    found = examined("heavy", "heavy")
    assert found.state == "loaded" and found.discovery_ms is not None
    text, cure = said(found.findings, found.subject)
    assert text.startswith("slow: it imports torch at discovery") and f"{found.discovery_ms:.0f} ms" in text
    assert found.discovery_ms > 100, "nobody imports torch faster than that"
    assert "only name things in 'interlace_heavy'" in cure
    assert "torch" not in str(found.providers) and found.providers == [("schedulers", "heavy")]


def test_slow_discovery_without_torch_is_a_warning(examined, monkeypatch):
    monkeypatch.setattr(plugins_doctor, "SLOW_MS", 0.0)
    found = examined("rival", "rival")
    ((level, text),) = [(finding.level, finding.text) for finding in found.findings]
    assert level == "warning" and text.startswith("slow: its discovery takes every command and every start ")


def test_rules_that_no_import_breaks(examined):
    found = examined("careless", "careless")
    subject = "scheduler '{}' (interlace-careless 0.8)".format
    text, cure = said(found.findings, subject("imports-torch"))
    assert text == "importing it imports torch, which schedulers must not: the front process loads them"
    assert cure.startswith("In interlace_careless_torch, import torch inside the functions that need it")
    text, cure = said(found.findings, subject("lenient"))
    assert "accepts any key, so a misspelt option is ignored" in text and 'extra="forbid"' in cure
    text, cure = said(found.findings, subject("two-models"))
    assert "Provider(options='interlace_careless_options:Other') and TwoModels.Options have different fields" in text
    levels = {finding.subject: finding.level for finding in found.findings}
    assert levels == {subject("imports-torch"): "error", subject("lenient"): "warning", subject("two-models"): "error"}


def diagnosed(capsys, *arguments: str) -> tuple[int, dict]:
    """Exit code and report of the command, without the built-in plugins, which take seconds."""
    code = cli.main(["plugins", "doctor", "--json", "--plugins.block", "interlace,interlace-blocked", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_conflicts_and_requirements(capsys, install):
    install("rival", "twin", "needy")
    wanted = "interlace-rival>=1,interlace-none,interlace-blocked,interlace-needy"
    install("blocked")
    code, report = diagnosed(capsys, "--plugins.require", wanted)
    findings = [(finding["subject"], finding["text"], finding["cure"]) for finding in report["findings"]]
    assert code == 1
    conflict = "scheduler 'twin' (interlace-rival 0.3 and interlace-twin 2.0)"
    ((text, cure),) = [rest for subject, *rest in findings if subject == conflict]
    assert (
        "is provided by interlace-rival 0.3 (entry point 'rival') and interlace-twin 2.0 (entry point 'twin')" in text
    )
    assert "scheduler.use = 'interlace-rival:twin' or scheduler.use = 'interlace-twin:twin'" in cure
    assert [rest for subject, *rest in findings if subject == "plugins.require"] == [
        ["'interlace-rival>=1' is not met: interlace-rival 0.3 is installed", "pip install 'interlace-rival>=1'"],
        ["'interlace-none' is not installed", "pip install 'interlace-none'"],
        ["'interlace-blocked' is kept out by plugins.allow or plugins.block", "Take it out of one of the two settings"],
    ]
    assert [rest for subject, *rest in findings if subject == "interlace-needy"] == [
        ["requires pydantic>=1000; pydantic " + pydantic_version() + " is installed", "pip install 'pydantic>=1000'"],
        ["requires interlace-not-there>=2, which is not installed", "pip install 'interlace-not-there>=2'"],
    ]


def pydantic_version() -> str:
    import pydantic

    return pydantic.VERSION


def test_required_package_that_does_not_load(install):
    install("broken")
    found = diagnose(settings(block=["interlace"], require=["interlace-broken"]), 60.0)
    assert said(found.findings, "plugins.require")[0] == "'interlace-broken' is installed but failed to load"


def test_blocked_plugins_are_not_imported(capsys, install):
    install("blocked", "rival")
    code, report = diagnosed(capsys)
    states = {entry["package"]: entry["state"] for entry in report["entry_points"]}
    assert (code, states) == (
        0,
        {"interlace": "blocked", "interlace-blocked": "blocked", "interlace-rival": "loaded"},
    )
    assert report["findings"] == []


def test_text_of_the_report(capsys, install):
    install("broken")
    assert cli.main(["plugins", "doctor", "--plugins.block", "interlace"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("PACKAGE") and "interlace-broken" in out
    assert "\nerror: interlace-broken 0.1, entry point 'broken': fails to load: ImportError: libfast.so.3" in out
    assert "\n  cure: Upgrade or reinstall it" in out and out.endswith("\n1 error, 0 warnings\n")


def test_progress_is_shown_on_a_terminal_only(capsys, install, monkeypatch):
    install("rival")
    command = ["plugins", "doctor", "--plugins.block", "interlace"]
    assert cli.main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(command) == 0
    assert "examining plugins" in capsys.readouterr().err.lower()


def test_children_find_what_the_parent_finds(install):
    """The path of this process counts, not what PYTHONPATH says."""
    (folder,) = install("rival")
    assert folder not in os.environ.get("PYTHONPATH", "") and folder in sys.path
    found = diagnose(settings(block=["interlace"]), 60.0)
    assert [name for one in found.entry_points for _, name in one.providers] == ["twin"]


@pytest.mark.slow
def test_built_in_plugins_are_in_order():
    found: Diagnosis = diagnose(settings(), 300.0)
    assert len(found.entry_points) >= 8 and all(one.state == "loaded" for one in found.entry_points)
    assert not [finding for finding in found.findings if finding.subject != "interlace"]


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "nan", "inf"])
def test_timeout_is_a_time(capsys, timeout):
    assert cli.main(["plugins", "doctor", f"--timeout={timeout}"]) == 2
    assert "--timeout" in capsys.readouterr().err


def test_methods_that_cannot_be_called_as_the_contract_says():
    class Narrow(LlamaForCausalLM):
        """Written before ranks could hold different numbers of heads."""

        @classmethod
        def attention_specs(cls, config, tensor_parallel=1):
            return []

    class Renamed(LlamaForCausalLM):
        def forward(self, ids, where, state, extra=None, *more, **named):
            """Names are the class's own: the engine calls with places."""

    (problem,) = check_signatures(Narrow)
    assert "Narrow.attention_specs(config, tensor_parallel=1) cannot be called" in problem.text
    assert "tensor_parallel: 'int' = 1, rank: 'int' = 0" in problem.text and "too many positional" in problem.text
    assert problem.cure == "Give it the parameters of interlace.interfaces.model.Model.attention_specs"
    assert not [*check_signatures(Renamed)]
