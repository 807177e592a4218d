"""The plugin kinds as a table, and the check that a class keeps the contract of its kind.

A contract has a version, a whole number. When it goes from N to N + 1, classes written for N go on working for two
minor releases: the contract names an `Adapter` under "N", every selected provider of that version gets one warning
line, and afterwards the adapter is taken out and N is too old.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from interlace import __version__
from interlace.errors import PluginContractError, PluginImportError
from interlace.hookspecs import KINDS


class Adapter(NamedTuple):
    """How classes written for a former version of a contract go on working for a while."""

    adapt: Callable[[type[Any]], type[Any]]
    """Given a class written for that version, a subclass of it that keeps the next version."""
    change: str
    """What the next version changed, as a clause for the warning: "`sort_key` is called `order_key`"."""
    until: str
    """The first release of Interlace without this adapter: the second minor release after the change."""


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
    has_use: bool = True
    """Whether the section's `use` selects one; otherwise the options of a plugin that uses it do."""
    processes: tuple[str, ...] = ("worker",)
    """Where a selected class is imported, of `front`, `engine core` and `worker`. Several may share a process."""
    adapters: Mapping[str, Adapter] = MappingProxyType({})
    """By former version that is still understood. Adapters form a chain: each leads to the next version."""

    @property
    def version(self) -> str:
        """The contract version this core speaks."""
        return KINDS[self.kind]


_INTERFACES = "interlace.interfaces"

CONTRACTS: Mapping[str, Contract] = {
    contract.kind: contract
    for contract in (
        Contract("models", "model architecture", "", f"{_INTERFACES}.model:Model"),
        Contract(
            "schedulers",
            "scheduler",
            "scheduler",
            f"{_INTERFACES}.scheduler:Scheduler",
            light=True,
            processes=("front", "engine core"),
        ),
        Contract(
            "orderings",
            "ordering",
            "orderings",
            f"{_INTERFACES}.ordering:Ordering",
            light=True,
            has_use=False,
            processes=("front", "engine core"),
        ),
        Contract("attention", "attention backend", "attention", f"{_INTERFACES}.attention:AttentionBackend"),
        Contract("executors", "executor", "executor", f"{_INTERFACES}.executor:Executor", processes=("engine core",)),
        Contract(
            "checkpoints",
            "checkpoint format",
            "checkpoint",
            f"{_INTERFACES}.checkpoint:Checkpoint",
            light=True,
            processes=("front", "worker"),
        ),
        Contract("kernels", "kernel set", "kernels", f"{_INTERFACES}.kernels:Kernels"),
        Contract(
            "logits_processors",
            "logits processor",
            "logits_processors",
            f"{_INTERFACES}.logits_processor:LogitsProcessor",
            processes=("front", "worker"),
        ),
        Contract("routers", "router", "router", f"{_INTERFACES}.router:Router", light=True, processes=("front",)),
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


def load_class(kind: str, target: str, version: str, owner: str, package: str) -> Any:
    """Import a provider's class, written for `version` of the contract of `kind`, and return it as a complete class of
    the current version: itself, or adapted.

    Raises `PluginImportError`, or `PluginContractError` naming what does not fit."""
    contract = CONTRACTS[kind]
    check_version(kind, version, owner, package)
    found: Any = load_target(target, owner)
    base = load_target(contract.base, f"the contract of {kind}")
    where = contract.base.replace(":", ".")
    if not isinstance(found, type) or not issubclass(found, base):
        raise PluginContractError(f"{owner} is {found!r}, which is not a subclass of {where}")
    while version != contract.version:
        found = contract.adapters[version].adapt(found)
        version = str(int(version) + 1)
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise PluginContractError(
            f"{owner} lacks {', '.join(missing)} of {where} (contract version {contract.version}): "
            f"write {'it' if len(missing) == 1 else 'them'} in class {found.__qualname__}"
        )
    return found


def check_version(kind: str, version: str, owner: str, package: str) -> None:
    """Raise `PluginContractError` unless a provider written for `version` of the contract can be used, as it is or
    adapted. `owner` is how messages call the provider, `package` what it comes in."""
    contract = CONTRACTS[kind]
    if version == contract.version or version in contract.adapters:
        return
    former = "".join(f", and {old} until {adapter.until}" for old, adapter in contract.adapters.items())
    speaks = f"this Interlace, {__version__}, speaks {contract.version}{former}"
    if not version:
        raise PluginContractError(
            f"{owner} does not say which version of the {kind} contract it is written for; {speaks}. Upgrade "
            f"{package}; its authors should state the one they wrote it for: Provider(..., api='{contract.version}')"
        )
    if not isinstance(version, str) or not version.isdecimal() or version != str(int(version)):
        raise PluginContractError(
            f"{owner} is said to be written for version {version!r} of the {kind} contract; {speaks}. Provider.api "
            f"should be a whole number as text. Upgrade {package}; its authors should write api='{contract.version}'"
        )
    both = f"{owner} is written for version {version} of the {kind} contract; {speaks}"
    if int(version) > int(contract.version):
        raise PluginContractError(f"{both}: it is too new. Upgrade interlace, or install an older {package}")
    raise PluginContractError(f"{both}: it is too old. Upgrade {package}, or install an older interlace")


def deprecation(kind: str, version: str, owner: str, package: str) -> str | None:
    """The warning about a provider that works only through adapters; None where there is nothing to warn of."""
    contract = CONTRACTS[kind]
    if version not in contract.adapters:
        return None
    steps = [contract.adapters[str(step)].change for step in range(int(version), int(contract.version))]
    return (
        f"{owner} is written for version {version} of the {kind} contract; the current one is {contract.version}: "
        f"{'; '.join(steps)}. It is adapted until Interlace {contract.adapters[version].until}: upgrade {package}"
    )
