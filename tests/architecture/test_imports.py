"""What importing costs: every module stands alone, and the start stays light."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "triton")

ALONE = """
import json, os, sys, warnings
import numpy, pydantic, msgspec, pluggy, torch
failures = {}
for module in json.load(sys.stdin):
    # A fork of an interpreter that has imported libraries, but nothing of interlace, is a fresh interpreter to it.
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            warnings.simplefilter("error")
            __import__(module)
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}"[:2000].encode() or b"?")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        message = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    if message or status:
        failures[module] = message or f"died with status {status}"
json.dump(failures, sys.stdout)
"""

LOADED = f"""
import io, json, sys
sys.argv = json.loads(sys.argv[1])
code, stdout, sys.stdout = 0, sys.stdout, io.StringIO()
try:
    if sys.argv:
        from interlace.cli import main
        code = main()
    else:
        import interlace
except SystemExit as stop:
    code = stop.code
heavy = [name for name in {HEAVY} if name in sys.modules]
json.dump({{"code": code or 0, "heavy": heavy, "printed": sys.stdout.getvalue()}}, stdout)
"""


def import_alone(modules: list[str]) -> dict[str, str]:
    """Module → why it cannot be imported as the first of its package, with warnings as errors."""
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, input=json.dumps(modules), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded_by(*arguments: str) -> dict:
    """Run the command line (or only `import interlace`) in a fresh interpreter: exit code, output, heavy modules."""
    command = [sys.executable, "-c", LOADED, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def best_time(*command: str) -> float:
    """Shortest of five runs, in seconds."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
def test_every_module_imports_alone(core, plugins, report):
    failures = import_alone([source.module for source in [*core, *plugins]])
    report(f"import {module}: {reason}" for module, reason in failures.items())


def test_importing_alone_catches_a_broken_module():
    failures = import_alone(["interlace.errors", "interlace.no_such_module"])
    assert list(failures) == ["interlace.no_such_module"]
    assert failures["interlace.no_such_module"].startswith("ModuleNotFoundError")


@pytest.mark.parametrize("arguments", [(), ("interlace", "--help"), ("interlace", "plugins", "list")], ids=" ".join)
def test_start_is_light(arguments):
    seen = loaded_by(*arguments)
    assert seen["code"] == 0
    assert seen["heavy"] == []
    assert bool(seen["printed"]) == bool(arguments)


def test_lightness_is_measured():
    code = LOADED.replace("import interlace", "import interlace.interfaces.model")
    done = subprocess.run([sys.executable, "-c", code, "[]"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["heavy"] == ["torch"]


def test_help_time_is_shown(capsys):
    """Machines differ, so the time is printed; what would make it slow is asserted above."""
    bare = best_time("-c", "pass")
    helped = best_time("-c", "import sys; sys.argv = ['interlace', '--help']; from interlace.cli import main; main()")
    with capsys.disabled():
        print(f"\ninterlace --help: {helped:.3f} s, of which a bare interpreter takes {bare:.3f} s")
    assert min(helped, bare) > 0  # which is the shorter one says something on an idle machine only
