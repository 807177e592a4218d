"""`interlace plugins doctor`: each installed entry point in a process of its own, then what only shows side by side."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
from packaging.requirements import InvalidRequirement, Requirement

from interlace.cli.plugins_probe import Checked, Checking, Discovered, Problem, Report, Task
from interlace.cli.tables import print_table
from interlace.config import LoadedSettings, PluginSettings
from interlace.contracts import CONTRACTS
from interlace.engine.startup import StartupProgress
from interlace.errors import PluginError
from interlace.hookspecs import Provider
from interlace.interfaces.executor import ExecutorEvent
from interlace.plugin_manager import Installed, find_installed, is_required, unmet_requirement
from interlace.registry import Offer, Origin, Registry

SLOW_MS = 200.0
"""Discovery that takes longer is worth a warning: every command and every start pays for it."""

_CHILD = (sys.executable, "-m", "interlace.cli.plugins_probe")


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong."""

    level: str
    """`error` (then the exit code is 1), or `warning`."""
    subject: str
    """The package and entry point, provider or setting it is about."""
    text: str
    cure: str


class Examined(msgspec.Struct):
    """What is known of one entry point."""

    package: str
    version: str
    entry_point: str
    target: str
    state: str
    """`loaded`, `blocked` or `broken`."""
    discovery_ms: float | None = None
    providers: list[tuple[str, str]] = []
    findings: list[Finding] = []

    @property
    def subject(self) -> str:
        return f"{self.package} {self.version}, entry point '{self.entry_point}'"


class Diagnosis(msgspec.Struct):
    """The whole report, as `--json` prints it."""

    entry_points: list[Examined]
    findings: list[Finding]
    """Of all entry points, and those about several of them or none."""

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)


def run_doctor(loaded: LoadedSettings, *, timeout: float, as_json: bool) -> int:
    """Print the diagnosis; 1 if anything in it is an error."""
    diagnosis = diagnose(loaded.settings.plugins, timeout)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(diagnosis), indent=2).decode() + "\n")
    else:
        _print(diagnosis)
    return 1 if diagnosis.count("error") else 0


def diagnose(settings: PluginSettings, timeout: float) -> Diagnosis:
    """Examine every installed entry point; nothing of a plugin is imported in this process.

    A child that takes longer than `timeout` seconds for one step is killed, and so is what it started."""
    installed = find_installed(settings)
    with StartupProgress() as progress, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        pending = [pool.submit(examine, plugin, timeout) for plugin in installed]
        examined = []
        for done, future in enumerate(pending, start=1):
            examined.append(future.result())
            progress.show(ExecutorEvent("progress", "examining plugins", {"done": done, "total": len(pending)}))
    findings = [finding for one in examined for finding in one.findings]
    findings += _conflicts(examined)
    findings += _requirements(settings, installed, examined)
    return Diagnosis(examined, findings)


# ── One entry point ─────────────────────────────────────────────────────────────────────────────────────────────


def examine(plugin: Installed, timeout: float) -> Examined:
    """Load one entry point in children until all its providers were tried."""
    origin = plugin.origin
    found = Examined(origin.package, origin.version, origin.entry_point, plugin.entry_point.value, "loaded")
    if not plugin.is_allowed:
        found.state = "blocked"
        return found
    skip = 0
    while True:
        reports, end = _run_child(Task(sys.path, origin, plugin.entry_point.value, skip), timeout)
        if skip == 0:
            _read_discovery(found, next((report for report in reports if isinstance(report, Discovered)), None), end)
        for report in reports:
            if isinstance(report, Checked):
                _add(found, report.index, report.problems)
        last = reports[-1] if reports else None
        if not isinstance(last, Checking):
            return found
        # It died or hung while this provider's code was imported; the next child goes on behind it.
        _add(found, last.index, [Problem("error", f"importing it {end}", _keep_out(origin))])
        skip = last.index + 1


def _read_discovery(found: Examined, discovered: Discovered | None, end: str) -> None:
    origin = Origin(found.package, found.version, found.entry_point)
    if discovered is None:
        found.state = "broken"
        found.findings.append(Finding("error", found.subject, f"loading it {end}", _keep_out(origin)))
        return
    found.discovery_ms = round(discovered.ms, 1)
    found.providers = discovered.providers
    if discovered.problems:
        found.state = "broken"
    found.findings += [Finding(p.level, found.subject, p.text, p.cure) for p in discovered.problems]
    module = found.target.partition(":")[0]
    if discovered.heavy:
        found.findings.append(
            Finding(
                "error",
                found.subject,
                f"slow: it imports {', '.join(discovered.heavy)} at discovery, which takes every command and every "
                f"start {discovered.ms:.0f} ms, whether it is selected or not",
                f"Its authors should only name things in '{module}': a Provider's target is imported when it is "
                f"selected. Until then: plugins.block = ['{found.package}']",
            )
        )
    elif discovered.ms > SLOW_MS:
        found.findings.append(
            Finding(
                "warning",
                found.subject,
                f"slow: its discovery takes every command and every start {discovered.ms:.0f} ms",
                f"See what '{module}' imports: python -X importtime -c 'import {module}'",
            )
        )


def _add(found: Examined, index: int, problems: list[Problem]) -> None:
    kind, name = found.providers[index]
    subject = f"{CONTRACTS[kind].noun} '{name}' ({found.package} {found.version})"
    found.findings += [Finding(p.level, subject, p.text.removeprefix(f"{subject} "), p.cure) for p in problems]


def _keep_out(origin: Origin) -> str:
    return f"Keep it out: plugins.block = ['{origin.package}:{origin.entry_point}'], and tell its authors"


def _run_child(task: Task, timeout: float) -> tuple[list[Report], str]:
    """What a child reported, and how it ended, as a clause."""
    child = subprocess.Popen(
        _CHILD,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that what a plugin starts can be ended with it
    )
    try:
        out, err = child.communicate(msgspec.json.encode(task), timeout)
        end = _how_it_ended(child.returncode, err)
    except subprocess.TimeoutExpired:
        _kill(child)
        out, err = child.communicate()
        end = f"did not end within {timeout:g} s"
    except BaseException:
        _kill(child)
        child.communicate()
        raise
    return [msgspec.json.decode(line, type=Report) for line in out.splitlines()], end


def _kill(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        child.kill()


def _how_it_ended(code: int, stderr: bytes) -> str:
    last = stderr.decode(errors="replace").strip().rpartition("\n")[2]
    how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"
    return f"crashes: the process {how}{f'; its last words: {last}' if last else ''}"


# ── Side by side ────────────────────────────────────────────────────────────────────────────────────────────────


def _conflicts(examined: list[Examined]) -> Iterator[Finding]:
    """Names that two packages offer. The text is the one a start gives."""
    offers: dict[tuple[str, str], list[Offer]] = defaultdict(list)
    for one in examined:
        origin = Origin(one.package, one.version, one.entry_point)
        for kind, name in one.providers:
            offers[kind, name].append(Offer(kind, Provider(name=name, target="", api=CONTRACTS[kind].version), origin))
    for (kind, name), same in offers.items():
        if len(same) > 1:
            try:
                Registry(kind, same).get(name)
            except PluginError as error:
                text, _, cure = str(error).partition(". ")
                packages = " and ".join(offer.origin.label for offer in same)
                yield Finding("error", f"{CONTRACTS[kind].noun} '{name}' ({packages})", text, cure)


def _requirements(settings: PluginSettings, installed: list[Installed], examined: list[Examined]) -> Iterator[Finding]:
    blocked = [plugin.origin for plugin in installed if not plugin.is_allowed]
    for text in settings.require:
        error = unmet_requirement(text, blocked)
        if error is not None:
            what, _, cure = str(error).removeprefix("plugins.require: ").partition(". Install it: ")
            yield Finding("error", "plugins.require", what, cure or "Take it out of one of the two settings")
        elif any(one.state == "broken" and is_required(one.package, text) for one in examined):
            yield Finding(
                "error",
                "plugins.require",
                f"'{text}' is installed but failed to load",
                "Mend the package as said above, or take it out of plugins.require",
            )
    for package in dict.fromkeys(plugin.origin.package for plugin in installed):
        yield from _missing_dependencies(package)


def _missing_dependencies(package: str) -> Iterator[Finding]:
    """What the package's own metadata demands and is not there, optional extras apart."""
    try:
        texts = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        cure = f"pip install '{wanted}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("error", package, f"requires {wanted}, which is not installed", cure)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding("error", package, f"requires {wanted}; {requirement.name} {version} is installed", cure)


# ── Output ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _print(diagnosis: Diagnosis) -> None:
    columns = ("package", "version", "entry point", "providers", "discovery", "state")
    print_table(
        columns,
        (
            (
                one.package,
                one.version,
                one.entry_point,
                str(len(one.providers)),
                "" if one.discovery_ms is None else f"{one.discovery_ms:.1f} ms",
                one.state,
            )
            for one in diagnosis.entry_points
        ),
    )
    for finding in diagnosis.findings:
        print(f"\n{finding.level}: {finding.subject}: {finding.text}\n  cure: {finding.cure}")
    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    if errors or warnings:
        print(f"\n{_counted(errors, 'error')}, {_counted(warnings, 'warning')}")
    else:
        print("\nnothing is wrong")


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
