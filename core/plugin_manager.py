"""`PluginManager`: find plugins, load them one by one, and keep what fails from hurting the rest.

Discovery happens once, in the process that starts an engine. There is no global manager: two engines may look at
different sets of plugins.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pluggy

from interlace import hookspecs
from interlace.clock import Clock
from interlace.config import PluginSettings, Settings
from interlace.contracts import CONTRACTS
from interlace.errors import PluginContractError, PluginError, PluginImportError, PluginNotFoundError, did_you_mean
from interlace.events import Events
from interlace.registry import Offer, Origin, PluginFailure, Registry

logger = logging.getLogger(__name__)

BUILT_IN = "interlace"
"""The distribution of Interlace itself: allowed unless it is blocked by name."""


class Installed(NamedTuple):
    """An installed entry point of Interlace's group; nothing of it is imported."""

    origin: Origin
    entry_point: importlib.metadata.EntryPoint
    is_allowed: bool
    """Whether `plugins.allow` and `plugins.block` let it be imported."""


def find_installed(settings: PluginSettings) -> list[Installed]:
    """All entry points, sorted by distribution and name, so that nothing depends on the order of sys.path."""
    allow, block = _canonical_set(settings.allow), _canonical_set(settings.block)

    def is_allowed(origin: Origin) -> bool:
        package = canonical_name(origin.package)
        names = {package, f"{package}:{origin.entry_point}"}
        return not names & block and (not allow or bool(names & allow) or package == BUILT_IN)

    found = []
    for entry_point in importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        package, version = _name_and_version(entry_point.dist) if entry_point.dist else (entry_point.module, "")
        origin = Origin(package or entry_point.module, version, entry_point.name)
        found.append(Installed(origin, entry_point, is_allowed(origin)))
    return sorted(found, key=lambda plugin: (canonical_name(plugin.origin.package), plugin.origin.entry_point))


class PluginManager:
    """The plugins of one engine: catalogue registries by kind, and the event hooks.

    `settings` says which distributions take part. `extra` are plugins given in code, modules or other objects with
    `hookimpl` functions: mistakes in them raise at once, while an installed plugin that fails is set aside as a
    `PluginFailure` with one warning. `installed` replaces what `find_installed` finds.

    Raises `PluginError` when a requirement of `plugins.require` is not met, unless `enforce` is false: then
    `unmet_requirements` has the errors, for commands that explain.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        extra: Sequence[object] = (),
        clock: Clock | None = None,
        *,
        installed: Sequence[Installed] | None = None,
        enforce: bool = True,
    ) -> None:
        self._settings = (settings or Settings()).plugins
        self._clock = clock
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._origins: dict[str, Origin] = {}
        self._failures: list[PluginFailure] = []
        self._blocked: list[Origin] = []
        self._discover(find_installed(self._settings) if installed is None else installed)
        for plugin in extra:
            self._add_in_code(plugin)
        self._offers = {kind: list(self._collect(kind)) for kind in CONTRACTS}
        for failure in self._failures:
            logger.warning("plugin %s failed to load and is ignored", failure)
        if enforce:
            for error in self.unmet_requirements():
                raise error

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

    def _discover(self, installed: Sequence[Installed]) -> None:
        for origin, entry_point, is_allowed in installed:
            if not is_allowed:
                self._blocked.append(origin)
                continue
            try:
                self._register(entry_point.load(), origin)
            except (Exception, SystemExit) as error:
                self._failures.append(PluginFailure(origin, error))

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
            except (Exception, SystemExit) as error:
                if origin.entry_point == "given in code":
                    raise
                self._failures.append(PluginFailure(origin, error))
            else:
                yield from offers

    # ── requirements ────────────────────────────────────────────────────────────────────────────────────────────

    def unmet_requirements(self) -> Iterator[PluginError]:
        """What is wrong with each entry of `plugins.require` that is not met."""
        for text in self._settings.require:
            error = unmet_requirement(text, self._blocked)
            failure = next((f for f in self._failures if is_required(f.origin.package, text)), None)
            if error is None and failure is not None:
                error = PluginImportError(f"plugins.require: '{text}' is installed but failed to load: {failure}")
                error.__cause__ = failure.error
            if error is not None:
                yield error


def unmet_requirement(text: str, blocked: Sequence[Origin]) -> PluginError | None:
    """Why the entry `text` of `plugins.require` is not met, as far as that shows without importing the package."""
    from packaging.requirements import Requirement  # slow to import, seldom needed

    requirement = Requirement(text)
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return PluginNotFoundError(f"plugins.require: '{text}' is not installed. Install it: pip install '{text}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return PluginNotFoundError(
            f"plugins.require: '{text}' is not met: {requirement.name} {version} is installed. "
            f"Install it: pip install '{text}'"
        )
    if any(is_required(origin.package, text) for origin in blocked):
        return PluginError(f"plugins.require: '{text}' is kept out by plugins.allow or plugins.block")
    return None


def is_required(package: str, text: str) -> bool:
    """Whether the entry `text` of `plugins.require` is about this distribution."""
    from packaging.requirements import Requirement

    return canonical_name(Requirement(text).name) == canonical_name(package)


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """From the head of METADATA. `Distribution.name` and `.version` each parse the whole of it, README included, which
    would be most of the time that discovery takes."""
    head = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").partition("\n\n")[0]
    lines = (line for line in reversed(head.splitlines()) if line.startswith(("Name: ", "Version: ")))
    fields = dict(line.split(": ", 1) for line in lines)
    return fields.get("Name", "").strip(), fields.get("Version", "").strip()


def canonical_name(package: str) -> str:
    """The form in which names of distributions are compared: `Slow_Metrics` → `slow-metrics` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _canonical_set(entries: Sequence[str]) -> set[str]:
    """`Slow_Metrics:main` → `slow-metrics:main`, for each entry."""
    parts = (entry.partition(":") for entry in entries)
    return {f"{canonical_name(package)}{colon}{entry_point}" for package, colon, entry_point in parts}


def _check_provider(given: Any, kind: str) -> hookspecs.Provider:
    if not isinstance(given, hookspecs.Provider):
        raise PluginContractError(f"interlace_{kind} should give Provider records and gave {given!r}")
    module, _, attribute = given.target.partition(":")
    if not given.name or not module or not attribute:
        raise PluginContractError(f"interlace_{kind} gave {given!r}: name and target ('module:Class') are needed")
    return given
