"""Generated packages of every kind install with pip, work in engines, and pass their conformance suites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interlace.contracts import CONTRACTS
from interlace.scaffold import write_package

pytestmark = pytest.mark.slow

NAMES = {kind: "TinyGraniteForCausalLM" if kind == "models" else f"my-{kind.replace('_', '-')}" for kind in CONTRACTS}
COMMAND = "import sys; from interlace.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Kind → folder of the generated package."""
    root = tmp_path_factory.mktemp("sources")
    for kind, name in NAMES.items():
        write_package(kind, name, root / kind)
    return {kind: root / kind for kind in NAMES}


@pytest.fixture(scope="module")
def site(sources, tmp_path_factory) -> Path:
    """All of them installed with pip into a folder of their own."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    folders = [str(folder) for folder in sources.values()]
    subprocess.run([*command, "--target", str(target), *folders], check=True, stdin=subprocess.DEVNULL, timeout=600)
    return target


def run(site: Path, *arguments: str, folder: Path | None = None) -> str:
    variables = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_doctor_finds_nothing(site):
    report = json.loads(run(site, "-c", COMMAND, "plugins", "doctor", "--json", "--plugins.block", "interlace"))
    examined = {entry["package"]: entry for entry in report["entry_points"] if entry["state"] != "blocked"}
    assert len(examined) == len(NAMES) and all(entry["state"] == "loaded" for entry in examined.values())
    assert {name for entry in examined.values() for _, name in entry["providers"]} == set(NAMES.values())
    about = [finding for finding in report["findings"] if finding["subject"] not in ("interlace",)]
    assert not about


@pytest.mark.parametrize("kind", [kind for kind in NAMES if kind != "models"])
def test_options_are_shown_without_the_code(site, kind):
    card = json.loads(run(site, "-c", COMMAND, "plugins", "show", f"{kind}:{NAMES[kind]}", "--json"))
    assert card["options"] and not card["loaded_torch"] and card["problem"] == ""
    assert all(option["description"] for option in card["options"])


@pytest.mark.parametrize("kind", NAMES)
def test_its_conformance_suite_passes(site, sources, kind):
    """As the README says, in the folder of the package."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestDeprecationWarning"]
    out = run(site, *arguments, folder=sources[kind])
    assert " passed" in out and "failed" not in out


def test_an_engine_made_of_them(site, tmp_path):
    """Five generated plugins at once, selected in a configuration file; greedy output is that of the built-in ones."""
    config = tmp_path / "engine.toml"
    config.write_text(f"""
max_model_len = 128
[scheduler]
use = "{NAMES["schedulers"]}"
[scheduler.options.{NAMES["schedulers"]}]
tokens_per_second = 50
[executor]
use = "{NAMES["executors"]}"
[attention]
use = "{NAMES["attention"]}"
[kernels]
use = "{NAMES["kernels"]}"
[logits_processors]
use = ["{NAMES["logits_processors"]}"]
""")
    prompt = ["--prompt", "The capital of France is", "--temperature", "0", "--max-tokens", "6", "--json"]
    generated = json.loads(run(site, "-c", COMMAND, "generate", *prompt, "--config", str(config)))
    built_in = json.loads(run(site, "-c", COMMAND, "generate", *prompt, "--max-model-len", "128"))
    assert generated[0]["outputs"][0]["text"] == built_in[0]["outputs"][0]["text"]


def test_a_scheduler_made_of_the_generated_ordering(site):
    order = ["--scheduler.use", "ordered", "--scheduler.options.ordered.order", f'["{NAMES["orderings"]}", "fcfs"]']
    out = run(site, "-c", COMMAND, "generate", "--prompt", "Hello", "--max-tokens", "2", "--json", *order)
    assert len(json.loads(out)[0]["outputs"][0]["token_ids"]) == 2


def test_the_code_is_typed(sources, repo_root, tmp_path):
    """mypy --strict, against the sources of this checkout."""
    farm = tmp_path / "farm" / "interlace"
    farm.mkdir(parents=True)
    for entry in (repo_root / "core").iterdir():
        (farm / entry.name).symlink_to(entry)
    (farm / "plugins").symlink_to(repo_root / "plugins")
    packages = [
        path for folder in sources.values() for path in folder.glob("interlace_*") if (path / "__init__.py").is_file()
    ]
    variables = {**os.environ, "MYPYPATH": os.pathsep.join([str(farm.parent), *map(str, sources.values())])}
    options = ["--config-file", str(repo_root / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    names = [word for package in packages for word in ("-p", package.name)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--follow-imports", "silent", *names],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and len(packages) == len(NAMES), done.stdout + done.stderr
