"""`Conformance`: what the conformance suites share; and `failures`, which runs a suite in code.

A suite is a pytest class. A plugin's author subclasses it and names the provider:

    class TestMine(AttentionConformance):
        attention = "mine"          # found as an engine finds it; or the class itself
        options = {"tile": 64}      # as in the configuration

Random tests take a `seed`, which is part of the test's name: `pytest -k "random_traffic and 17"` repeats one failure.
"""

from __future__ import annotations

import inspect
import itertools
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from interlace.contracts import CONTRACTS, load_target
from interlace.errors import PluginContractError
from interlace.plugin_manager import PluginManager
from interlace.registry import Offer


def find_offer(kind: str, name: str, where: str = "") -> Offer:
    """What the installed plugins offer under `name`. `where` says in errors what asked for it.

    Raises `PluginError` if there is no such provider, or two."""
    return PluginManager().registry(kind).get(name, where)


def find_provider(kind: str, named: str | type, where: str = "") -> Any:
    """The class of a provider: found by its name as an engine finds it, or given and checked.

    Raises `PluginError` if there is none or it does not keep its contract."""
    if isinstance(named, str):
        return find_offer(kind, named, where).load()
    contract = CONTRACTS[kind]
    base = load_target(contract.base, f"the contract of {kind}")
    if not isinstance(named, type) or not issubclass(named, base):
        raise PluginContractError(f"{where}: {named!r} is not a subclass of {contract.base.replace(':', '.')}")
    if missing := sorted(getattr(named, "__abstractmethods__", ())):
        raise PluginContractError(f"{where}: {named.__qualname__} lacks {', '.join(missing)} of its contract")
    return named


class Conformance:
    """Base of the suites. `target` and `target_options` are there once pytest has called `setup_class`."""

    kind: ClassVar[str]
    """As in `interlace.hookspecs.KINDS`."""
    selector: ClassVar[str]
    """Name of the attribute in which a subclass names its provider."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options of the provider, as the configuration would have them."""
    seeds: ClassVar[Sequence[int]] = range(20)
    """One run of each random test per seed. Fewer are faster and find less."""
    target: ClassVar[Any]
    target_options: ClassVar[Any]

    @classmethod
    def setup_class(cls) -> None:
        """Find the provider. Called by pytest before the first test."""
        named = getattr(cls, cls.selector, None)
        if named is None:
            example = f'{cls.selector} = "the name of your {CONTRACTS[cls.kind].noun}"'
            raise TypeError(f"{cls.__name__} does not say what to test: write `{example}` in the class")
        cls.target = find_provider(cls.kind, named, f"{cls.__name__}.{cls.selector}")
        cls.target_options = cls.target.Options(**cls.options) if hasattr(cls.target, "Options") else None

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[Any]]:
        """Argument of a test → its values; a test runs once for each combination of those it takes."""
        return {"seed": cls.seeds}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        for name, values in self.parameters().items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)


def failures(suite: type[Conformance], only: str = "") -> dict[str, str]:
    """Run a suite here and now, as pytest would: the name of each test that fails → why (its first failure).

    For those who write suites or providers that are wrong on purpose. `only`: tests whose name contains it."""
    import pytest

    suite.setup_class()
    found: dict[str, str] = {}
    for name, function in inspect.getmembers(suite, inspect.isfunction):
        if not name.startswith("test_") or only not in name:
            continue
        for arguments in _combinations(suite, function):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    given = {"tmp_path": Path(folder)} if "tmp_path" in inspect.signature(function).parameters else {}
                    function(suite(), **arguments, **given)
                except pytest.skip.Exception:
                    continue
                except Exception as error:
                    found[name] = f"{arguments}: {type(error).__name__}: {error}"
                    break
    return found


def skip(reason: str) -> NoReturn:
    """End a test that has nothing to say about this provider."""
    import pytest

    pytest.skip(reason)


def shuffled(items: Sequence[Any], rng: random.Random) -> list[Any]:
    """A copy in random order."""
    return rng.sample(items, len(items))


def _combinations(suite: type[Conformance], function: Any) -> Iterator[dict[str, Any]]:
    values = {
        name: values for name, values in suite.parameters().items() if name in inspect.signature(function).parameters
    }
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))
