"""`PluginManager`: find plugins, load them one by one, and keep what fails from hurting the rest.

Discovery happens once, in the process that starts an engine. There is no global manager: two engines may look at
different sets of plugins.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from interlace import hookspecs
from interlace.clock import Clock
from interlace.config import Settings
from interlace.contracts import CONTRACTS
from interlace.errors import PluginContractError, PluginError, PluginImportError, PluginNotFoundError, did_you_mean
from interlace.events import Events
from interlace.registry import Offer, Origin, PluginFailure, Registry

logger = logging.getLogger(__name__)

BUILT_IN = "interlace"
"""The distribution of Interlace itself: allowed unless it is blocked by name."""


class PluginManager:
    """The plugins of one engine: catalogue registries by kind, and the event hooks.

    `settings` says which distributions take part. `extra` are plugins given in code, modules or other objects with
    `hookimpl` functions: mistakes in them raise at once, while an installed plugin that fails is set aside as a
    `PluginFailure` with one warning.

    Raises `PluginError` when a requirement of `plugins.require` is not met.
    """

    def __init__(
        self, settings: Settings | None = None, extra: Sequence[object] = (), clock: Clock | None = None
    ) -> None:
        self._settings = (settings or Settings()).plugins
        self._clock = clock
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._origins: dict[str, Origin] = {}
        self._failures: list[PluginFailure] = []
        self._blocked: list[Origin] = []
        self._discover()
        for plugin in extra:
            self._add_in_code(plugin)
        self._offers = {kind: list(self._collect(kind)) for kind in CONTRACTS}
        for failure in self._failures:
            logger.warning("plugin %s failed to load and is ignored", failure)
        self._check_requirements()

    @property
    def failures(self) -> tuple[PluginFailure, ...]:
        """Installed plugins that could not be loaded."""
        return tuple(self._failures)

    @property
    def blocked(self) -> tuple[Origin, ...]:
        """Installed plugins that were not imported because of `plugins.allow` or `plugins.block`."""
        return tuple(self._blocked)

    def registry(self, kind: str) -> Registry:
        """What the plugins offer of `kind` (a key of `interlace.hookspecs.KINDS`)."""
        return Registry(kind, self._offers[kind], self._failures, self._blocked)

    @cached_property
    def events(self) -> Events:
        """The event hooks of these plugins."""
        return Events(self._manager, self._clock)

    # ── discovery ───────────────────────────────────────────────────────────────────────────────────────────────

    def _discover(self) -> None:
        for origin, entry_point in _entry_points():
            if not self._allowed(origin):
                self._blocked.append(origin)
                continue
            try:
                plugin = entry_point.load()
                self._register(plugin, origin)
            except (Exception, SystemExit) as error:
                self._failures.append(PluginFailure(origin, error))

    def _allowed(self, origin: Origin) -> bool:
        names = {canonicalize_name(origin.package), f"{canonicalize_name(origin.package)}:{origin.entry_point}"}
        if names & {_canonical(entry) for entry in self._settings.block}:
            return False
        allow = {_canonical(entry) for entry in self._settings.allow}
        return not allow or bool(names & allow) or canonicalize_name(origin.package) == BUILT_IN

    def _add_in_code(self, plugin: object) -> None:
        if self._manager.is_registered(plugin):
            return  # installed and given in code: the same module, once
        name = getattr(plugin, "__name__", None) or type(plugin).__qualname__
        self._register(plugin, Origin(package=name, version="", entry_point="given in code"))

    def _register(self, plugin: object, origin: Origin) -> None:
        self._check_hooks(plugin)
        name = f"{origin.package}:{origin.entry_point}"
        if name in self._origins:
            name = f"{name} #{len(self._origins)}"
        try:
            self._manager.register(plugin, name)
        except pluggy.PluginValidationError as error:
            raise PluginContractError(" ".join(str(error).split())) from error
        self._origins[name] = origin

    def _check_hooks(self, plugin: object) -> None:
        """Refuse what pluggy lets pass in silence: unknown hooks, hooks without the marker, wrappers."""
        known = [name for name in vars(self._manager.hook) if not name.startswith("_")]
        for attribute in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                if attribute in known and callable(getattr(plugin, attribute)):
                    raise PluginContractError(f"{attribute} is named like a hook but lacks the @hookimpl marker")
                continue
            name = options.get("specname") or attribute
            if name not in known:
                raise PluginContractError(
                    f"unknown hook '{name}'.{did_you_mean(name, known)} Hooks: {', '.join(known)}"
                )
            if options.get("wrapper") or options.get("hookwrapper"):
                raise PluginContractError(f"{name} is a hook wrapper, which Interlace does not call")

    def _collect(self, kind: str) -> Iterator[Offer]:
        """Ask every plugin for its providers of `kind`; one that fails is set aside without the others noticing."""
        for implementation in getattr(self._manager.hook, f"interlace_{kind}").get_hookimpls():
            origin = self._origins[implementation.plugin_name]
            try:
                offers = [Offer(kind, _check_provider(given, kind), origin) for given in implementation.function()]
            except Exception as error:
                if origin.entry_point == "given in code":
                    raise
                self._failures.append(PluginFailure(origin, error))
            else:
                yield from offers

    # ── requirements ────────────────────────────────────────────────────────────────────────────────────────────

    def _check_requirements(self) -> None:
        for text in self._settings.require:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                raise PluginNotFoundError(
                    f"plugins.require: '{text}' is not installed. Install it: pip install '{text}'"
                ) from None
            if not requirement.specifier.contains(version, prereleases=True):
                raise PluginNotFoundError(
                    f"plugins.require: '{text}' is not met: {requirement.name} {version} is installed. "
                    f"Install it: pip install '{text}'"
                )
            if any(canonicalize_name(origin.package) == name for origin in self._blocked):
                raise PluginError(f"plugins.require: '{text}' is kept out by plugins.allow or plugins.block")
            for failure in self._failures:
                if canonicalize_name(failure.origin.package) == name:
                    raise PluginImportError(
                        f"plugins.require: '{text}' is installed but failed to load: {failure}"
                    ) from failure.error


def _entry_points() -> Iterable[tuple[Origin, importlib.metadata.EntryPoint]]:
    """Entry points of the group, sorted by distribution and name, so that nothing depends on the order of sys.path."""
    found = []
    for entry_point in importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        distribution = entry_point.dist
        package = distribution.name if distribution else entry_point.module
        version = distribution.version if distribution else ""
        found.append((Origin(package, version, entry_point.name), entry_point))
    return sorted(found, key=lambda pair: (canonicalize_name(pair[0].package), pair[0].entry_point))


def _canonical(entry: str) -> str:
    """`Slow_Metrics:main` → `slow-metrics:main`."""
    package, colon, entry_point = entry.partition(":")
    return f"{canonicalize_name(package)}{colon}{entry_point}"


def _check_provider(given: Any, kind: str) -> hookspecs.Provider:
    if not isinstance(given, hookspecs.Provider):
        raise PluginContractError(f"interlace_{kind} should give Provider records and gave {given!r}")
    module, _, attribute = given.target.partition(":")
    if not given.name or not module or not attribute:
        raise PluginContractError(f"interlace_{kind} gave {given!r}: name and target ('module:Class') are needed")
    return given
