"""No file of the repository names a folder of the machine it was written on."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

# Put together from parts, so that this file does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:" + "|".join(["work", "root"]) + r")/[\w.]")


def machine_paths(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"{name}:{number}: {line.strip()[:100]}"


def test_no_path_of_a_build_machine(repo_root, report):
    if not (repo_root / ".git").exists():
        pytest.skip("not a git checkout: the list of its files is unknown")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=True).stdout
    files = [repo_root / name for name in listed.split("\0") if name]
    assert len(files) > 20

    def violations() -> Iterator[str]:
        for path in files:
            if path.is_file():
                text = path.read_bytes().decode("utf-8", errors="ignore")
                yield from machine_paths(path.relative_to(repo_root).as_posix(), text)

    report(violations())


def test_the_search_catches_a_path():
    for text in ("see " + "/work" + "/main", "'" + "/root" + "/.cache'"):
        assert len(list(machine_paths("x.md", "fine\n" + text))) == 1
    for text in ("step/work/x", "/workers/x", "$HOME/work/x", "~/work/x", "a /root CA"):
        assert not list(machine_paths("x.md", text)), text


def missing_paths(name: str, text: str, root) -> Iterator[str]:
    """Files and folders of the repository that a page names in backticks and that do not exist."""
    for path in re.findall(r"`((?:core|plugins|tests|docs)/[\w./-]*)`", text):
        if not (root / path).exists():
            yield f"{name}: there is no {path}"


def test_pages_name_files_that_exist(repo_root, report):
    pages = [repo_root / "README.md", *(repo_root / "docs").glob("*.md")]
    assert len(pages) > 3
    report(line for page in pages for line in missing_paths(page.name, page.read_text("utf-8"), repo_root))


def test_links_between_pages_lead_somewhere(repo_root, report):
    def violations() -> Iterator[str]:
        for page in [repo_root / "README.md", repo_root / "CHANGELOG.md", *(repo_root / "docs").glob("*.md")]:
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
                if not (page.parent / target).exists():
                    yield f"{page.name}: the link to {target} is broken"

    report(violations())


def test_the_search_catches_a_missing_file(repo_root):
    assert list(missing_paths("x.md", "see `core/no_such.py` and `core/`", repo_root)) == [
        "x.md: there is no core/no_such.py"
    ]
