"""The page on writing plugins is executed from top to bottom: its files, its commands, its snippets."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES, RUNS = 6, 3
"""Blocks that are files, and snippets; a floor, so that a change of the page's form cannot empty the test."""


class Block(NamedTuple):
    """One code block of the page."""

    language: str
    marker: str
    text: str

    @property
    def commands(self) -> list[str]:
        return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]


class Session:
    """A reader who does what the page says, in a folder of their own."""

    def __init__(self, workspace: Path, site: Path) -> None:
        self.workspace = workspace
        self.site = site
        self.outputs: dict[str, str] = {}
        """Command, or first line of a snippet → what it printed."""
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        self.environment = {**os.environ, "PYTHONPATH": str(site), "PATH": path}

    def follow(self, block: Block) -> None:
        if block.marker.startswith("file="):
            path = self.workspace / "interlace-sjf" / block.marker.removeprefix("file=")
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
            installed = self.site / block.marker.removeprefix("file=")
            if installed.parent.is_dir():  # an editable install, which `translate` replaces, sees later files, too
                installed.write_text(block.text)
        elif block.marker == "run":
            for command in block.commands:
                self.outputs[command] = self.run("bash", "-c", self.translate(command)).stdout
            if block.language == "python":
                self.outputs[block.text] = self.run(sys.executable, "-c", block.text).stdout

    def translate(self, command: str) -> str:
        """The same, without network and without a change to the environment the tests run in."""
        if command.startswith("pip install"):
            options = f"--quiet --no-deps --no-build-isolation --target {self.site}"
            return f"{sys.executable} -m {command.replace('--editable', options)}"
        return command.replace("python -m build", "python -m build --no-isolation")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        done = self.attempt(*command)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def attempt(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.workspace,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture(scope="module")
def blocks(repo_root) -> list[Block]:
    text = (repo_root / "docs" / "writing-plugins.md").read_text("utf-8")
    return [Block(language, marker.strip(), body) for language, marker, body in BLOCK.findall(text)]


@pytest.fixture(scope="module")
def session(blocks, tmp_path_factory) -> Session:
    reader = Session(tmp_path_factory.mktemp("workspace"), tmp_path_factory.mktemp("site"))
    for block in blocks:
        reader.follow(block)
    return reader


def test_no_block_is_left_out(blocks):
    """Python is a file or is run; a command that is not run needs the network or an account."""
    assert sum(block.marker.startswith("file=") for block in blocks) >= FILES
    assert sum(block[:2] == ("python", "run") for block in blocks) >= RUNS
    for block in blocks:
        if block.language == "python":
            assert block.marker == "run" or block.marker.startswith("file="), block.text
        elif block.language == "console" and block.marker != "run":
            assert all(command.startswith("python -m twine") for command in block.commands), block.text


def test_the_scheduler_is_thirty_lines(blocks):
    scheduler = next(block for block in blocks if block.marker == "file=interlace_sjf/scheduler.py")
    assert len(scheduler.text.strip().splitlines()) <= 30


def test_a_conformance_test_is_five_lines(blocks):
    test = next(block for block in blocks if block.marker == "file=tests/test_conformance.py")
    assert len([line for line in test.text.splitlines() if line]) <= 5


def test_the_modules_it_calls_public_are_those_plugins_may_import(blocks, repo_root):
    page = (repo_root / "docs" / "writing-plugins.md").read_text("utf-8")
    text = page.partition("What you may rely on:")[2].partition("Everything else")[0]
    layers = ast.parse((repo_root / "tests" / "architecture" / "test_layers.py").read_text("utf-8"))
    (public,) = [
        ast.literal_eval(node.value)
        for node in layers.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PUBLIC_MODULES"
    ]
    assert set(re.findall(r"`([\w.]+)`", text)) == {"interlace", *public}


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(blocks, session):
    expected = [command for block in blocks if block.marker == "run" for command in block.commands]
    expected += [block.text for block in blocks if block[:2] == ("python", "run")]
    assert set(session.outputs) == set(expected)


@pytest.mark.slow
def test_excerpts_are_in_the_scaffolded_files(blocks, session):
    excerpts = [block for block in blocks if block.marker.startswith("in=")]
    assert excerpts
    for block in excerpts:
        text = (session.workspace / "interlace-sjf" / block.marker.removeprefix("in=")).read_text()
        assert block.text in text


@pytest.mark.slow
def test_the_package_passes_its_conformance_test(session):
    summary = session.outputs["pytest interlace-sjf"].splitlines()[-1]
    assert re.search(r"\b\d{2,} passed", summary) and "failed" not in summary


@pytest.mark.slow
def test_the_scheduler_is_listed_shown_and_planned_with(session):
    outputs = session.outputs
    row = next(line for line in outputs["interlace plugins list"].splitlines() if "interlace-sjf" in line)
    assert row.split()[:3] == ["schedulers", "sjf", "available"]
    assert "scheduler.options.sjf.tokens_per_second" in outputs["interlace plugins show sjf"]
    assert "sjf" in outputs["interlace config plan --config interlace-sjf/engine.toml"]


@pytest.mark.slow
def test_the_wheel_that_would_be_published_holds_the_package(session):
    dist = session.workspace / "interlace-sjf" / "dist"
    assert sorted(path.suffix for path in dist.iterdir()) == [".gz", ".whl"]


@pytest.mark.slow
def test_a_wrong_option_of_it_is_explained(session):
    flags = ["--scheduler.use", "sjf", "--scheduler.options.sjf.tokens_per_secnd", "50"]
    done = session.attempt("interlace", "config", "plan", *flags)
    assert done.returncode == 2
    assert "tokens_per_secnd" in done.stderr and "tokens_per_second" in done.stderr
