"""Fifty installed packages: the list has them all, and loads none of the heavy libraries.

How long it takes is measured by `interlace bench startup --packages 50`, not asserted here.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from interlace.bench.plugins import measure_listing, write_packages

LISTING = """
import io, json, sys
sys.path.insert(0, sys.argv[1])
from interlace import cli
out, sys.stdout = sys.stdout, io.StringIO()
code = cli.main(["plugins", "list", "--json", "--scheduler.use", "generated-7"])
loaded = [name for name in sys.modules if name in ("torch", "transformers", "triton", "rich")]
targets = [name for name in sys.modules if name.startswith("interlace_generated_") and "." in name]
json.dump([code, json.loads(sys.stdout.getvalue()), loaded, targets], out)
"""


def test_fifty_packages_are_listed_without_loading_them(tmp_path):
    write_packages(tmp_path, 50)
    command = [sys.executable, "-c", LISTING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, rows, loaded, targets = json.loads(done.stdout)
    assert code == 0 and not loaded and not targets
    generated = {row["name"]: row for row in rows if row["package"].startswith("interlace-generated-")}
    assert len(generated) == 50
    assert {row["state"] for name, row in generated.items() if name != "generated-7"} == {"available"}
    assert generated["generated-7"]["state"] == "selected" and generated["generated-7"]["version"] == "1.7"


def test_measuring():
    figures = measure_listing(3, repeat=2)
    assert figures.packages == 3 and 0 < figures.find_s < figures.command_s
    assert figures.discover_s > 0 and figures.command_s >= figures.interpreter_s > 0


def test_generated_packages_work(tmp_path, monkeypatch):
    from interlace.plugin_manager import PluginManager

    write_packages(tmp_path, 2)
    monkeypatch.syspath_prepend(str(tmp_path))
    offer = PluginManager().registry("schedulers").get("generated-1")
    assert offer.load().__name__ == "Generated"


@pytest.mark.parametrize("number", [0, -1])
def test_no_packages_are_nothing_to_measure(number):
    with pytest.raises(ValueError, match=r"at least 1"):
        measure_listing(number, repeat=1)
