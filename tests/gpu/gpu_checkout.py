"""This checkout as an installed `interlace`, without installing anything."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OPTIONAL = ("fastapi", "uvicorn", "httptools", "prometheus_client", "aiohttp")
"""What only the server and its clients import."""
_IMPORTED_AS = {"PyYAML": "yaml", "pyzmq": "zmq"}


def make_site(folder: Path) -> Path:
    """Fill `folder`, which is then to be put on `sys.path`: the package `interlace`, made of links to core/ and
    plugins/, and a distribution with the entry points of pyproject.toml, so that built-in plugins are found."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["package-dir"]
    package = folder / "interlace"
    package.mkdir(parents=True)
    for part in (ROOT / packages["interlace"]).iterdir():
        (package / part.name).symlink_to(part)
    (package / "plugins").symlink_to(ROOT / packages["interlace.plugins"])
    found = re.search(r'__version__ = "(.+)"', (package / "__init__.py").read_text())
    assert found is not None
    info = folder / f"interlace-{found[1]}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: interlace\nVersion: {found[1]}\n")
    groups = project["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def missing_packages() -> list[str]:
    """Requirements of an engine that are not installed here, and pytest, which the conformance suites need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [re.split(r"[>=<\[; ]", requirement)[0] for requirement in project["dependencies"]]
    wanted = [name for name in [*named, "triton", "pytest"] if name not in _OPTIONAL]
    return [name for name in wanted if importlib.util.find_spec(_IMPORTED_AS.get(name, name.replace("-", "_"))) is None]
