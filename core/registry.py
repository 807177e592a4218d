"""`Registry`: what the plugins of one kind offer, by name, with provenance, and errors that say how to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from pydantic import BaseModel

from interlace.contracts import CONTRACTS, load_target
from interlace.errors import (
    CheckpointError,
    PluginConflictError,
    PluginContractError,
    PluginNotFoundError,
    did_you_mean,
)
from interlace.hookspecs import Provider
from interlace.model_config import ModelConfig
from interlace.spec import Component


class Origin(msgspec.Struct, frozen=True):
    """Where a plugin came from: a distribution's entry point, or an object given in code."""

    package: str
    version: str
    entry_point: str

    @property
    def label(self) -> str:
        """Package and version, for messages."""
        return f"{self.package} {self.version}".strip()


class PluginFailure(msgspec.Struct, frozen=True):
    """A plugin that was found and could not be loaded."""

    origin: Origin
    error: BaseException

    def __str__(self) -> str:
        return f"'{self.origin.entry_point}' of {self.origin.label} ({self.reason})"

    @property
    def reason(self) -> str:
        """Type and text of the error, on one line."""
        return " ".join(f"{type(self.error).__name__}: {self.error}".split())


class Offer(msgspec.Struct, frozen=True):
    """A provider and where it came from."""

    kind: str
    provider: Provider
    origin: Origin

    @property
    def name(self) -> str:
        return self.provider.name

    @property
    def qualified(self) -> str:
        """`distribution:name`, which can be selected where the plain name is ambiguous."""
        return f"{self.origin.package}:{self.name}"

    def component(self, options: Mapping[str, Any] | None = None, reason: str = "") -> Component:
        """The offer as part of a `ResolvedSpec`."""
        return Component(
            kind=self.kind,
            name=self.name,
            target=self.provider.target,
            api=self.provider.api,
            options=dict(options or {}),
            package=self.origin.package,
            version=self.origin.version,
            reason=reason,
            host=self.provider.host,
        )

    def load(self) -> Any:
        """Import the class. Raises `PluginImportError` or `PluginContractError`."""
        return self.component().load()

    def model_config(self, raw: dict[str, Any], where: str) -> ModelConfig:
        """The numbers of a model of this architecture, with the provider's help where it offers some.

        Imports no model code. `where` names the file in errors. Raises `CheckpointError` or `PluginImportError`."""
        if self.provider.config is None:
            return ModelConfig.from_hf(raw, where)
        owner = self.component().owner
        read = load_target(self.provider.config, f"the config function of {owner}")
        try:
            standard = dict(read(raw))
        except Exception as error:
            raise CheckpointError(
                f"{where}: {owner} cannot read the model configuration: {type(error).__name__}: {error}"
            ) from error
        return ModelConfig.from_hf({**raw, **standard}, where)

    def options_model(self) -> type[BaseModel]:
        """The model of the options; imports the class only if the provider does not name the model apart."""
        owner = self.component().owner
        if self.provider.options:
            model = load_target(self.provider.options, f"the options model of {owner}")
        else:
            model = getattr(self.load(), "Options", None)
        if not isinstance(model, type) or not issubclass(model, BaseModel):
            raise PluginContractError(f"Options of {owner} is {model!r}, which is not a pydantic model")
        return model


class Registry:
    """All offers of one kind. Immutable; belongs to one plugin manager."""

    def __init__(
        self, kind: str, offers: Sequence[Offer], failures: Sequence[PluginFailure] = (), blocked: Sequence[Origin] = ()
    ) -> None:
        self.kind = kind
        self._offers = tuple(offers)
        self._failures = tuple(failures)
        self._blocked = tuple(blocked)

    def __iter__(self) -> Iterator[Offer]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, name: str) -> bool:
        return any(name in (offer.name, offer.qualified) for offer in self._offers)

    def names(self) -> list[str]:
        """Plain names, sorted, each once."""
        return sorted({offer.name for offer in self._offers})

    def get(self, name: str, where: str = "") -> Offer:
        """The offer called `name` (plain, or `distribution:name`). `where` says in errors what asked for it.

        Imports nothing. Raises `PluginNotFoundError`, `PluginConflictError`, or `PluginContractError` when the
        offer is written for a version of the contract that is not understood.
        """
        found = [offer for offer in self._offers if name in (offer.name, offer.qualified)]
        if not found:
            raise self._not_found(name, where)
        if len(found) > 1:
            raise self._conflict(name, found, where)
        found[0].component().check_version()
        return found[0]

    def _not_found(self, name: str, where: str) -> PluginNotFoundError:
        contract = CONTRACTS[self.kind]
        offered = sorted(f"{offer.name} ({offer.origin.label})" for offer in self._offers)
        parts = [
            f"no {contract.noun} is called '{name}'{f' ({where})' if where else ''}.{did_you_mean(name, self.names())}",
            f"Installed {self.kind}: {', '.join(offered) or 'none'}.",
        ]
        if self._failures:
            parts.append(f"Plugins that failed to load: {'; '.join(map(str, self._failures))}.")
        if self._blocked:
            blocked = sorted({origin.label for origin in self._blocked})
            parts.append(f"Packages kept out by plugins.allow or plugins.block: {', '.join(blocked)}.")
        choose = "choose one of these, or " if contract.section and offered else ""
        parts.append(f"Cure: {choose}install the package that provides '{name}' (pip install …).")
        error = PluginNotFoundError(" ".join(parts))
        if len(self._failures) == 1:
            error.__cause__ = self._failures[0].error
        return error

    def _conflict(self, name: str, found: list[Offer], where: str) -> PluginConflictError:
        contract = CONTRACTS[self.kind]
        owners = " and ".join(f"{offer.origin.label} (entry point '{offer.origin.entry_point}')" for offer in found)
        qualified = sorted({offer.qualified for offer in found})
        block = f"block a package: plugins.block = ['{found[-1].origin.package}']"
        if len(qualified) < len(found):
            cure = f"One package offers it twice, which only its author can mend; or {block}."
        elif contract.section:
            prefix = f"{contract.section}.use = " if contract.has_use else ""
            choices = " or ".join(f"{prefix}'{choice}'" for choice in qualified)
            cure = f"Select one by its qualified name: {choices}; or {block}."
        else:
            cure = f"{block[0].upper()}{block[1:]}."
        return PluginConflictError(
            f"the {contract.noun} '{name}'{f' ({where})' if where else ''} is provided by {owners}. {cure}"
        )
