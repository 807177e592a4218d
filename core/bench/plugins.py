"""How long a command takes to look through many installed plugins: `interlace bench startup --packages N`."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from interlace.clock import MonotonicClock

_DISCOVERY = """
import json, sys
sys.path.insert(0, sys.argv[1])
from interlace.clock import MonotonicClock
from interlace.config import load_settings
from interlace.plugin_manager import PluginManager, find_installed
now = MonotonicClock().now
settings = load_settings().settings
began = now()
installed = find_installed(settings.plugins)
found = now()
PluginManager(settings, installed=installed, enforce=False)
json.dump({"find": found - began, "discover": now() - found, "torch": "torch" in sys.modules}, sys.stdout)
"""
_COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from interlace.cli import main
sys.exit(main())
"""

_PROVIDER = """from interlace import Provider, hookimpl


@hookimpl
def interlace_schedulers():
    yield Provider(name="generated-{number}", target="interlace_generated_{number}.scheduler:Generated", api="1")
"""
_SCHEDULER = """from interlace.interfaces.scheduler import Scheduler, StepBuilder


class Generated(Scheduler):
    def plan(self, step: StepBuilder) -> None:
        step.continue_running()
"""


class ListingTimes(msgspec.Struct, frozen=True):
    """Medians, in seconds."""

    packages: int
    """Generated packages, besides what is installed."""
    command_s: float
    """`interlace plugins list` as a process of its own, from start to end."""
    command_cpu_s: float
    """Of which on a processor: what is left when nothing else runs on the machine."""
    interpreter_s: float
    """Of which an interpreter that does nothing takes."""
    find_s: float
    """Reading the metadata of all installed packages."""
    discover_s: float
    """Importing the plugin modules and asking them what they offer."""


def write_packages(folder: Path, number: int) -> None:
    """Write `number` installed distributions into `folder`, each with one scheduler and a README in its metadata."""
    for i in range(number):
        info = folder / f"interlace_generated_{i}-1.{i}.dist-info"
        info.mkdir()
        readme = "A paragraph of a README, as long as they are.\n" * 200
        head = f"Metadata-Version: 2.1\nName: interlace-generated-{i}\nVersion: 1.{i}\nRequires-Dist: interlace\n"
        (info / "METADATA").write_text(f"{head}\n{readme}")
        (info / "entry_points.txt").write_text(f"[interlace]\ngenerated_{i} = interlace_generated_{i}\n")
        package = folder / f"interlace_generated_{i}"
        package.mkdir()
        (package / "__init__.py").write_text(_PROVIDER.format(number=i))
        (package / "scheduler.py").write_text(_SCHEDULER)


def measure_listing(packages: int, repeat: int) -> ListingTimes:
    """List the installed plugins and `packages` generated ones, `repeat` times, each in a fresh interpreter.

    Raises `RuntimeError` if a listing fails or imports torch, for then the figure would mean something else."""
    if packages < 1 or repeat < 1:
        raise ValueError("there should be at least 1 package and at least 1 run")
    clock = MonotonicClock()
    commands: list[float] = []
    cpu: list[float] = []
    interpreters: list[float] = []
    parts: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_packages(Path(folder), packages)
        _run(_DISCOVERY, folder)  # compiles the generated modules, as pip does when it installs
        for _ in range(repeat):
            began = clock.now()
            _run("pass")
            interpreters.append(clock.now() - began)
            began, used = clock.now(), _cpu_of_children()
            _run(_COMMAND, folder)
            commands.append(clock.now() - began)
            cpu.append(_cpu_of_children() - used)
            parts.append(json.loads(_run(_DISCOVERY, folder)))
            if parts[-1]["torch"]:
                raise RuntimeError("discovery imported torch: see interlace plugins doctor")
    return ListingTimes(
        packages=packages,
        command_s=statistics.median(commands),
        command_cpu_s=statistics.median(cpu),
        interpreter_s=statistics.median(interpreters),
        find_s=statistics.median(part["find"] for part in parts),
        discover_s=statistics.median(part["discover"] for part in parts),
    )


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _run(code: str, folder: str = "") -> str:
    arguments = [folder, "plugins", "list"] if folder else []
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"a listing ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
