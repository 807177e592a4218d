"""The page on writing plugins does what it says: its package installs with pip, its snippets run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = "import sys; from interlace.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def blocks(repo_root) -> list[tuple[str, str, str]]:
    """(language, words after it, text) of every code block of the page."""
    text = (repo_root / "docs" / "writing-plugins.md").read_text("utf-8")
    return [(language, words.strip(), body) for language, words, body in BLOCK.findall(text)]


@pytest.fixture(scope="module")
def package(blocks, tmp_path_factory) -> Path:
    """The page's package, written out and installed with pip into a folder of its own."""
    source, target = tmp_path_factory.mktemp("interlace-sjf"), tmp_path_factory.mktemp("site")
    for _, words, body in blocks:
        if words.startswith("file="):
            path = source / words.removeprefix("file=")
            path.parent.mkdir(exist_ok=True)
            path.write_text(body)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, stdin=subprocess.DEVNULL)
    return target


def attempt(package: Path, *command: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def run(package: Path, *command: str) -> str:
    done = attempt(package, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def interlace(package: Path, *arguments: str) -> str:
    return run(package, sys.executable, "-c", COMMAND, *arguments)


def test_the_scheduler_is_thirty_lines(blocks):
    scheduler = next(body for _, words, body in blocks if words == "file=interlace_sjf/scheduler.py")
    assert len(scheduler.strip().splitlines()) <= 30


def test_an_installed_scheduler_is_listed_and_answers(package):
    listed = json.loads(interlace(package, "plugins", "list", "--json", "--scheduler.use", "sjf"))
    mine = next(entry for entry in listed if entry["name"] == "sjf")
    assert (mine["package"], mine["version"], mine["state"]) == ("interlace-sjf", "0.1", "selected")
    arguments = ["--prompt", "Why is the sky blue?", "--max-tokens", "4", "--scheduler.use", "sjf", "--json"]
    answers = json.loads(interlace(package, "generate", *arguments, "--scheduler.options.sjf.tokens_per_second", "50"))
    assert len(answers[0]["outputs"][0]["token_ids"]) > 0


def test_a_wrong_option_of_it_is_explained(package):
    flags = ["--scheduler.use", "sjf", "--scheduler.options.sjf.tokens_per_secnd", "50"]
    done = attempt(package, sys.executable, "-c", COMMAND, "config", "plan", *flags)
    assert done.returncode == 2
    assert "tokens_per_secnd" in done.stderr and "tokens_per_second" in done.stderr


def test_every_snippet_runs(blocks, package):
    snippets = [body for language, words, body in blocks if language == "python" and words == "run"]
    assert len(snippets) == 2
    for snippet in snippets:
        run(package, sys.executable, "-c", snippet)


def test_no_python_block_is_left_out(blocks):
    """Each python block is either a file of the package or run."""
    assert all(words == "run" or words.startswith("file=") for language, words, _ in blocks if language == "python")
