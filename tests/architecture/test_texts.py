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
