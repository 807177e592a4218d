"""The plugin kinds as a table, and the check that a class keeps the contract of its kind."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from interlace.errors import PluginContractError, PluginImportError
from interlace.hookspecs import KINDS


class Contract(NamedTuple):
    """What the core knows of one kind of plugin."""

    kind: str
    """As in `interlace_<kind>`."""
    noun: str
    """For messages: one provider of the kind."""
    section: str
    """Table of the configuration that selects and sets it; empty for models, which the checkpoint selects."""
    base: str
    """The abstract class, as "module:Class"."""
    light: bool = False
    """Classes of the kind import without torch, so they are checked before the engine starts."""

    @property
    def version(self) -> str:
        """The contract version this core speaks."""
        return KINDS[self.kind]


_INTERFACES = "interlace.interfaces"

CONTRACTS: Mapping[str, Contract] = {
    contract.kind: contract
    for contract in (
        Contract("models", "model architecture", "", f"{_INTERFACES}.model:Model"),
        Contract("schedulers", "scheduler", "scheduler", f"{_INTERFACES}.scheduler:Scheduler", light=True),
        Contract("attention", "attention backend", "attention", f"{_INTERFACES}.attention:AttentionBackend"),
        Contract("executors", "executor", "executor", f"{_INTERFACES}.executor:Executor"),
        Contract("checkpoints", "checkpoint format", "checkpoint", f"{_INTERFACES}.checkpoint:Checkpoint", light=True),
        Contract("kernels", "kernel set", "kernels", f"{_INTERFACES}.kernels:Kernels"),
        Contract(
            "logits_processors",
            "logits processor",
            "logits_processors",
            f"{_INTERFACES}.logits_processor:LogitsProcessor",
        ),
    )
}
"""Kind → contract, in the order of hookspecs.py."""


def load_target(target: str, owner: str) -> Any:
    """Import "module:Class". Raises `PluginImportError`, cause chained; `owner` says in it whose target this is."""
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        hint = (
            ". A class defined in __main__ exists in that process only: move it into a module that can be imported, "
            "or set engine.process = 'inline'"
            if module_name == "__main__"
            else ""
        )
        raise PluginImportError(
            f"{owner} cannot be imported from '{target}': {type(error).__name__}: {error}{hint}"
        ) from error
    return found


def check_class(kind: str, found: Any, owner: str) -> None:
    """Raise `PluginContractError` unless `found` is a complete subclass of the abstract class of `kind`."""
    contract = CONTRACTS[kind]
    base = load_target(contract.base, f"the contract of {kind}")
    where = contract.base.replace(":", ".")
    if not isinstance(found, type) or not issubclass(found, base):
        raise PluginContractError(f"{owner} is {found!r}, which is not a subclass of {where}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise PluginContractError(
            f"{owner} lacks {', '.join(missing)} of {where} (contract version {contract.version}): "
            f"write {'it' if len(missing) == 1 else 'them'} in class {found.__qualname__}"
        )


def check_version(kind: str, version: str, owner: str) -> None:
    """Raise `PluginContractError` unless a provider written for `version` of the contract can be used."""
    contract = CONTRACTS[kind]
    if version == contract.version:
        return
    both = f"{owner} is written for version {version} of the {kind} contract, this Interlace speaks {contract.version}"
    if not version.isdecimal():
        raise PluginContractError(f"{both}: Provider.api should be a whole number as text, such as '1'")
    if int(version) > int(contract.version):
        raise PluginContractError(f"{both}: it is too new; upgrade interlace, or install an older release of it")
    raise PluginContractError(f"{both}: it is too old; upgrade the package that provides it")
