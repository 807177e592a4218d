"""Everything in the README works: its snippets run, its commands answer, its configuration file is valid."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = "import sys; from interlace.cli import main; sys.exit(main())"
NOT_RUN_HERE = ("make ", "interlace chat")
"""`make` targets run in CI's own steps, and `chat` has tests of its own on a terminal."""


@pytest.fixture(scope="module")
def readme(repo_root) -> list[tuple[str, str]]:
    """(language, text) of every code block."""
    return BLOCK.findall((repo_root / "README.md").read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(readme, tmp_path_factory):
    """A folder with the README's configuration file."""
    path = tmp_path_factory.mktemp("readme")
    (path / "engine.toml").write_text(next(text for language, text in readme if language == "toml"))
    return path


def test_every_snippet_runs(readme, folder):
    snippets = [text for language, text in readme if language == "python"]
    assert len(snippets) == 2
    for snippet in snippets:
        done = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 10


def test_every_command_answers(readme, folder):
    lines = [line for language, text in readme if language == "console" for line in text.splitlines()]
    commands = [line.removeprefix("$ ").partition("  # ")[0] for line in lines if line.startswith("$ ")]
    ran = 0
    for command in commands:
        if command.startswith(NOT_RUN_HERE):
            continue
        program, *arguments = shlex.split(command)
        assert program == "interlace", command
        done = subprocess.run(
            [sys.executable, "-c", RUN, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip(), command
        ran += 1
    assert ran >= 9


def test_the_make_targets_exist(readme, repo_root):
    makefile = (repo_root / "Makefile").read_text("utf-8")
    targets = re.findall(r"make ([a-z-]+)", (repo_root / "README.md").read_text("utf-8"))
    assert {"demo", "test", "setup"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets
