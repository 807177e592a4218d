"""For authors of plugins, and for Interlace's own tests: fakes, harnesses and suites. Public API.

    harness           EngineHarness: an engine core over a scripted executor, step by step, everything checked
    executor          ScriptedExecutor: known tokens, scripted failures, no model; also by name in a spec
    checked_worker    CheckedWorker: carries out plans and trusts nothing
    histories         run_history: random traffic, faults and aborts from one seed
    guard             CheckedPolicy: a scheduling policy that sees its contract and nothing else
    adversaries       policies that do everything wrong, which the core survives
    executor_driver   Driver: an engine core over a real executor, with a bound on every wait
    footprint         Footprint: processes, threads, files and shared memory that something left behind
    faults            a checkpoint and a logits processor that fail on purpose, in whatever process
    time_limit        time_limit: end what does not end by itself, at the line where it hangs
    numerics          how near each way of keeping weights comes to float32: python -m interlace.testing.numerics
    overhead          what the engine itself costs per step: python -m interlace.testing.overhead
    fleet             Fleet: replicas behind a router, without processes; engines die when the test says so
    fake_stream       FakeStream: a device that is late on purpose, for what runs ahead of one; AheadExecutor over it
    fakes             ScriptedClient: an engine client with known answers, for what surrounds the engine
    model_harness     ModelHarness: a model over a paged cache, without an engine

The conformance suites are pytest classes. A plugin's author subclasses one and names the provider:

    from interlace.testing import SchedulerConformance

    class TestMine(SchedulerConformance):
        scheduler = "mine"

Nothing is imported here, so that a test pays only for what it uses: a suite is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace.testing.attention_suite import AttentionConformance
    from interlace.testing.ordering_suite import OrderingConformance
    from interlace.testing.router_suite import RouterConformance
    from interlace.testing.scheduler_suite import SchedulerConformance

SUITES: Mapping[str, str] = {
    "AttentionConformance": "interlace.testing.attention_suite",
    "CheckpointConformance": "interlace.testing.checkpoint_suite",
    "ExecutorConformance": "interlace.testing.executor_suite",
    "KernelsConformance": "interlace.testing.kernels_suite",
    "LogitsProcessorConformance": "interlace.testing.logits_processor_suite",
    "ModelConformance": "interlace.testing.model_suite",
    "OrderingConformance": "interlace.testing.ordering_suite",
    "RouterConformance": "interlace.testing.router_suite",
    "SchedulerConformance": "interlace.testing.scheduler_suite",
}
"""Conformance suite → the module it is in."""

__all__ = [
    "AttentionConformance",
    "CheckpointConformance",
    "ExecutorConformance",
    "KernelsConformance",
    "LogitsProcessorConformance",
    "ModelConformance",
    "OrderingConformance",
    "RouterConformance",
    "SchedulerConformance",
]


def __getattr__(name: str) -> Any:
    if name in SUITES:
        return getattr(importlib.import_module(SUITES[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
