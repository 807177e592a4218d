"""`interlace plugins new KIND NAME`: write a plugin package, and say what to do with it."""

from __future__ import annotations

from pathlib import Path

from interlace.cli.plugins import discover
from interlace.config import LoadedSettings
from interlace.contracts import CONTRACTS
from interlace.errors import PluginConflictError
from interlace.scaffold import check_name, write_package


def run_new(loaded: LoadedSettings, kind: str, name: str, directory: str | None) -> int:
    """Write the package and list its files. Raises `ScaffoldError`, or `PluginConflictError` for a name that an
    installed package has."""
    check_name(kind, name)
    for offer in discover(loaded).registry(kind):
        if offer.name == name:
            raise PluginConflictError(
                f"the {CONTRACTS[kind].noun} '{name}' exists: {offer.origin.label} provides it. Choose another name: "
                "what two packages provide is ambiguous"
            )
    written = write_package(kind, name, None if directory is None else Path(directory))
    root = written[0].parent
    for path in written:
        print(path)
    print(f"\nNext:\n  pip install --editable '{root}[test]'\n  pytest {root}\n  interlace plugins show {kind}:{name}")
    return 0
