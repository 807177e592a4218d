"""The child process of `interlace plugins doctor`: load one entry point, check what it offers, say what was found.

    python -m interlace.cli.plugins_probe

The task comes as one JSON object on stdin; reports go to stdout, one JSON object a line, each written before the next
thing is tried. So whatever a plugin does to this process (crash, hang, exit), the parent knows what it was doing.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from inspect import Parameter
from types import FunctionType

import msgspec
from pydantic import BaseModel

from interlace.clock import MonotonicClock
from interlace.config import Settings, describe
from interlace.contracts import CONTRACTS
from interlace.errors import InterlaceError
from interlace.hookspecs import ENTRY_POINT_GROUP
from interlace.plugin_manager import Installed, PluginManager
from interlace.registry import Offer, Origin

HEAVY = ("torch", "transformers", "triton")
"""What only workers may import."""


class Task(msgspec.Struct):
    """One entry point, and which of its providers to check."""

    path: list[str]
    """`sys.path` of the parent."""
    origin: Origin
    value: str
    """"module" or "module:object", as the entry point states it."""
    skip: int = 0
    """Providers that earlier children have dealt with."""


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong, and what to do about it."""

    level: str
    """`error`, or `warning` for what works all the same."""
    text: str
    cure: str


class Discovered(msgspec.Struct, tag=True):
    """What every start-up does with the plugin is done."""

    ms: float
    heavy: list[str]
    """Which of `HEAVY` that imported."""
    providers: list[tuple[str, str]]
    """(kind, name) of each."""
    problems: list[Problem]


class Checking(msgspec.Struct, tag=True):
    """A provider's code is about to be imported."""

    index: int


class Checked(msgspec.Struct, tag=True):
    """A provider was checked."""

    index: int
    problems: list[Problem]


Report = Discovered | Checking | Checked


def main() -> int:
    """Carry out the task on stdin."""
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plugin prints must not mix with the reports

    def send(report: Report) -> None:
        reports.write(msgspec.json.encode(report) + b"\n")
        reports.flush()

    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    sys.path[:] = task.path
    logging.disable(logging.WARNING)
    probe(task, send)
    return 0


def probe(task: Task, send: Callable[[Report], None]) -> None:
    """Discover the plugin as an engine would, then check each of its providers."""
    PluginManager(Settings(), installed=[])  # what the first manager of a process costs is not the plugin's
    entry_point = importlib.metadata.EntryPoint(task.origin.entry_point, task.value, ENTRY_POINT_GROUP)
    clock = MonotonicClock()
    began = clock.now()
    plugins = PluginManager(Settings(), installed=[Installed(task.origin, entry_point, True)])
    offers = [offer for kind in CONTRACTS for offer in plugins.registry(kind)]
    took = (clock.now() - began) * 1000
    failures = [
        Problem(
            "error",
            f"fails to load: {failure.reason}",
            f"Upgrade or reinstall it (pip install --upgrade {task.origin.package}), or keep it out: plugins.block = "
            f"['{task.origin.package}']",
        )
        for failure in plugins.failures
    ]
    send(Discovered(took, _heavy(), [(offer.kind, offer.name) for offer in offers], failures))
    for index, offer in enumerate(offers):
        if index >= task.skip:
            send(Checking(index))
            send(Checked(index, list(check_offer(offer))))


def _heavy() -> list[str]:
    return [name for name in HEAVY if name in sys.modules]


def check_offer(offer: Offer) -> Iterator[Problem]:
    """Everything that can be wrong with a provider without running it."""
    upgrade = (
        f"Upgrade or reinstall {offer.origin.package}; its authors find such things with this command and with the "
        "conformance suites of interlace.testing"
    )
    before = _heavy()
    try:
        if offer.provider.options:
            yield from _check_options_module(offer)
        found = offer.load()
        heavy = [name for name in _heavy() if name not in before]
        if heavy and CONTRACTS[offer.kind].light:
            yield Problem(
                "error",
                f"importing it imports {', '.join(heavy)}, which {offer.kind} must not: the front process loads them",
                f"In {offer.provider.target.partition(':')[0]}, import {heavy[0]} inside the functions that need it, "
                "or under `if TYPE_CHECKING` for annotations",
            )
        yield from check_signatures(found)
        yield from _check_options(offer, found)
        if offer.component().deprecation:
            yield Problem("warning", str(offer.component().deprecation), f"Upgrade {offer.origin.package}")
    except InterlaceError as error:
        # Some messages end in their own cure.
        what, _, cure = " ".join(str(error).split()).partition(". Upgrade ")
        yield Problem("error", what, f"Upgrade {cure}" if cure else upgrade)


def check_signatures(found: type) -> Iterator[Problem]:
    """Methods that cannot be called as the contract says: written before it gained a parameter, or misspelt."""
    contract = next((one for one in found.__mro__ if one.__module__.startswith("interlace.interfaces.")), object)
    for name, stated in vars(contract).items():
        if name.startswith("__") or not isinstance(stated, FunctionType | classmethod | staticmethod):
            continue
        expected, own = inspect.signature(getattr(contract, name)), inspect.signature(getattr(found, name))
        kinds = [(one.name, one.kind) for one in expected.parameters.values()]
        arguments = [name for name, kind in kinds if kind is Parameter.POSITIONAL_OR_KEYWORD]
        keywords = {name: None for name, kind in kinds if kind is Parameter.KEYWORD_ONLY}
        try:
            own.bind(*arguments, **keywords)
        except TypeError as error:
            yield Problem(
                "error",
                f"{found.__qualname__}.{name}{own} cannot be called as the contract says, with {expected}: {error}",
                f"Give it the parameters of {contract.__module__}.{contract.__qualname__}.{name}",
            )


def _check_options_module(offer: Offer) -> Iterator[Problem]:
    before = _heavy()
    offer.options_model()
    heavy = [name for name in _heavy() if name not in before]
    if heavy:
        yield Problem(
            "warning",
            f"its options model {offer.provider.options} imports {', '.join(heavy)}: `plugins show` and every start "
            "that sets its options wait for that",
            "Move the model into a module without heavy imports",
        )


def _check_options(offer: Offer, found: type) -> Iterator[Problem]:
    if not CONTRACTS[offer.kind].section:
        return  # the kind takes no options
    model = offer.options_model()
    own: object = getattr(found, "Options", None)
    if not isinstance(own, type) or not issubclass(own, BaseModel):
        yield Problem(
            "error",
            f"{found.__qualname__}.Options is {own!r}, which is not a pydantic model",
            f"Write `Options = {model.__name__}` into class {found.__qualname__}",
        )
    elif set(own.model_fields) != set(model.model_fields):
        yield Problem(
            "error",
            f"Provider(options='{offer.provider.options}') and {found.__qualname__}.Options have different fields",
            f"Write `Options = {model.__name__}` into class {found.__qualname__}",
        )
    if model.model_config.get("extra") != "forbid":
        yield Problem(
            "warning",
            f"its options model {model.__qualname__} accepts any key, so a misspelt option is ignored in silence",
            'Give it model_config = ConfigDict(extra="forbid")',
        )
    list(describe(model))  # raises where a field cannot be shown


if __name__ == "__main__":
    status = main()
    os._exit(status)  # threads and exit handlers of a plugin are not waited for
