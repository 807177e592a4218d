"""Every hook of Interlace, in one file.

*Catalogue hooks* answer "what exists?" once, at start-up: each returns `Provider` records, and nothing is imported
until the configuration selects a provider. *Event hooks* tell subscribers what happened; they run in the front
process, at most once per step, and are skipped when nobody implements them.

A plugin module implements hooks with the `hookimpl` marker and is listed as an entry point of group `interlace`:

    from interlace import Provider, hookimpl

    @hookimpl
    def interlace_schedulers():
        yield Provider(name="sjf", target="my_package.sjf:ShortestJobFirst", summary="shortest prompt first", api="1")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import pluggy

if TYPE_CHECKING:
    from interlace.messages import RequestSummary, StepStats

PROJECT = "interlace"
ENTRY_POINT_GROUP = "interlace"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

KINDS: Mapping[str, str] = {
    "models": "1",
    "schedulers": "1",
    "orderings": "1",
    "attention": "1",
    "executors": "1",
    "checkpoints": "1",
    "kernels": "1",
    "logits_processors": "1",
    "routers": "1",
}
"""Plugin kind → the contract version this core speaks. The catalogue hook of a kind is `interlace_<kind>`."""


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """One named thing a plugin offers.

    `name` is what the configuration selects (for models: the Hugging Face architecture string). `target`
    ("package.module:Class") is imported only when selected. `api` is the version of the kind's contract the target
    was written for; a provider that states none is refused when it is selected. `options` ("package.module:Model",
    importable without torch) states the options model when it should be readable without importing `target`; otherwise
    it is `target.Options`.

    `config` ("package.module:function", importable without torch) is for models whose configuration files have names
    of their own: given the raw configuration, the function returns what it says under the standard names that
    `ModelConfig.from_hf` reads (`{"hidden_size": raw["n_embd"], …}`). These are added to the raw configuration.

    `host` ("package.module:function", importable without torch) is for executors that can take the engine core along
    to where their workers are: given the validated options, the function returns an `interlace.interfaces.host.Host`,
    or None where the engine core is to stay beside its front.
    """

    name: str
    target: str
    summary: str = ""
    api: str = ""
    options: str | None = None
    config: str | None = None
    host: str | None = None


# ── Catalogue hooks ─────────────────────────────────────────────────────────────────────────────────────────────


@hookspec
def interlace_models() -> Iterable[Provider]:
    """Model architectures, named by their Hugging Face architecture string (`LlamaForCausalLM`).

    Called once at start-up. Targets are `interlace.interfaces.model.Model` classes.
    """
    return ()


@hookspec
def interlace_schedulers() -> Iterable[Provider]:
    """Scheduling policies, selected by `scheduler.use`.

    Called once at start-up. Targets are `interlace.interfaces.scheduler.Scheduler` classes.
    """
    return ()


@hookspec
def interlace_orderings() -> Iterable[Provider]:
    """Orderings, small sort keys that schedulers combine, selected by an option of a scheduler
    (`scheduler.options.ordered.order`).

    Called once at start-up. Targets are `interlace.interfaces.ordering.Ordering` classes.
    """
    return ()


@hookspec
def interlace_attention() -> Iterable[Provider]:
    """Attention backends, selected by `attention.use`.

    Called once at start-up. Targets are `interlace.interfaces.attention.AttentionBackend` classes.
    """
    return ()


@hookspec
def interlace_executors() -> Iterable[Provider]:
    """Executors, selected by `executor.use`.

    Called once at start-up. Targets are `interlace.interfaces.executor.Executor` classes.
    """
    return ()


@hookspec
def interlace_checkpoints() -> Iterable[Provider]:
    """Checkpoint formats; the first one whose `matches` accepts the resolved path reads it.

    Called once at start-up. Targets are `interlace.interfaces.checkpoint.Checkpoint` classes.
    """
    return ()


@hookspec
def interlace_kernels() -> Iterable[Provider]:
    """Kernel sets: fused building blocks, resolved per op, selected by `kernels.use`.

    Called once at start-up. Targets are `interlace.interfaces.kernels.Kernels` classes.
    """
    return ()


@hookspec
def interlace_logits_processors() -> Iterable[Provider]:
    """Logits processors that requests may name, enabled by `logits_processors.use`.

    Called once at start-up. Targets are `interlace.interfaces.logits_processor.LogitsProcessor` classes.
    """
    return ()


@hookspec
def interlace_routers() -> Iterable[Provider]:
    """Routers, which choose one of `engine.replicas` for each request, selected by `router.use`.

    Called once at start-up. Targets are `interlace.interfaces.router.Router` classes.
    """
    return ()


# ── Event hooks ─────────────────────────────────────────────────────────────────────────────────────────────────


@hookspec
def on_engine_start(settings: Mapping[str, Any]) -> None:
    """The engine is ready. `settings` are the effective settings as nested plain data, without API keys.

    Called once per engine, in the front process.
    """


@hookspec
def on_step(stats: StepStats) -> None:
    """A step was completed. Called once per step, in the front process; must not block."""


@hookspec
def on_request_finished(summary: RequestSummary) -> None:
    """A request ended, for whatever reason. Called once per request, in the front process; must not block."""


@hookspec
def on_shutdown() -> None:
    """The engine is about to stop. Called once per engine, in the front process."""
