"""A tiny model over a device that is slow on purpose, and the same model in step with the host to compare with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interlace.config import load_settings
from interlace.interfaces.executor import Executor
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve
from interlace.spec import Component, ResolvedSpec
from interlace.testing.executor_driver import Driver
from interlace.testing.executor_suite import MODEL, SETTINGS
from interlace.testing.fake_stream import AheadExecutor, FakeStream

GRAPHS = Component(kind="attention", name="reference", target="interlace.testing.reference:ReferenceAttention")


@pytest.fixture
def tiny_spec(tmp_path: Path) -> Callable[..., ResolvedSpec]:
    """`tiny_spec(graphs=True, **{"cache.max_blocks": 9})`: the suite's model, over attention that graphs can hold."""

    def make(graphs: bool = True, **settings: Any) -> ResolvedSpec:
        (tmp_path / "config.json").write_text(json.dumps(MODEL))
        loaded = load_settings({"model": str(tmp_path), **SETTINGS, "threads": 1, **settings}, env={})
        spec = resolve(loaded, PluginManager(loaded.settings))
        return msgspec.structs.replace(spec, attention=(GRAPHS,)) if graphs else spec

    return make


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """`drive(spec, FakeStream())`: a driver over an executor that runs ahead; `drive(spec, executor)` over another."""
    executors: list[Executor] = []

    def make(spec: ResolvedSpec, runs_on: FakeStream | Executor) -> Driver:
        is_stream = isinstance(runs_on, FakeStream)
        executors.append(AheadExecutor(AheadExecutor.Options(), runs_on) if is_stream else runs_on)
        return Driver(executors[-1], spec, 60.0)

    yield make
    for executor in executors:
        executor.shutdown()
