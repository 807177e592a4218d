"""The composition root: the only place where an engine is put together from its parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from interlace.clock import Clock, MonotonicClock
from interlace.config import LoadedSettings
from interlace.config.settings import EngineSettings
from interlace.engine.client import EngineClient, OnEvent
from interlace.engine.core import EngineCore
from interlace.errors import ConfigError
from interlace.events import Events
from interlace.interfaces.executor import Executor, ExecutorInfo
from interlace.plugin_manager import PluginManager
from interlace.resolve import check_portable, open_tokenizer, resolve
from interlace.spec import ResolvedSpec
from interlace.tokenizer import Tokenizer


class Assembly(NamedTuple):
    """Everything a front needs. The client is not started yet."""

    loaded: LoadedSettings
    spec: ResolvedSpec
    plugins: PluginManager
    tokenizer: Tokenizer
    client: EngineClient
    clock: Clock

    @property
    def events(self) -> Events:
        """The event hooks of the plugins."""
        return self.plugins.events


def assemble(
    loaded: LoadedSettings,
    *,
    default_process: str = "inline",
    supervised: bool = False,
    plugins: Sequence[object] = (),
    clock: Clock | None = None,
) -> Assembly:
    """Discover plugins, resolve the settings, read the tokenizer, and choose the transport to the engine.

    `default_process` is what `engine.process = "auto"` means here. `supervised`: a child process that dies is started
    again, as `engine.max_restarts` allows. `plugins` are further plugins given in code.
    Raises what was wrong before anything is started."""
    clock = clock or MonotonicClock()
    manager = PluginManager(loaded.settings, plugins, clock)
    spec = resolve(loaded, manager)
    engine = loaded.settings.engine
    process = default_process if engine.process == "auto" else engine.process
    client: EngineClient
    if engine.replicas > 1:
        client = make_replicas(spec, loaded, clock)
    elif supervised and process == "subprocess":
        client = supervise(spec, engine, clock)
    else:
        client = make_client(spec, process, clock)
    return Assembly(loaded, spec, manager, open_tokenizer(loaded, spec), client, clock)


def make_replicas(spec: ResolvedSpec, loaded: LoadedSettings, clock: Clock) -> EngineClient:
    """A client of `engine.replicas` engines, each supervised in a process of its own. Raises `ConfigError`."""
    from interlace.engine.guarded_router import GuardedRouter
    from interlace.engine.replicas import Replicas
    from interlace.engine.sharing import describe_shares, share_machine

    engine = loaded.settings.engine
    if engine.process == "inline":
        raise ConfigError(
            f"engine.replicas = {engine.replicas} ({loaded.source('engine.replicas')}) needs a process for each, but "
            f"engine.process = 'inline' ({loaded.source('engine.process')}). Allowed: 'auto' or 'subprocess'"
        )
    assert spec.router is not None
    router = GuardedRouter(spec.router.build(), spec.router.name, clock.now)
    specs = share_machine(spec, engine.replicas)
    layout = f"{describe_shares(specs)}; router {spec.router.name} ({spec.router.reason})"
    block_size = spec.cache.block_size if spec.cache.prefix_caching else 0
    return Replicas([supervise(one, engine, clock) for one in specs], router, block_size, layout)


def supervise(spec: ResolvedSpec, engine: EngineSettings, clock: Clock) -> EngineClient:
    """The client of an engine in a process of its own that is started again when it dies."""
    from interlace.engine.supervisor import Supervisor

    make = partial(make_client, spec, "subprocess", clock)
    return Supervisor(make, clock, engine.max_restarts, engine.restart_window_s)


def make_client(spec: ResolvedSpec, process: str, clock: Clock) -> EngineClient:
    """The client for `process`: `inline` or `subprocess`."""
    if process == "subprocess":
        from interlace.engine.subprocess_client import SubprocessClient

        check_portable(spec)
        return SubprocessClient(spec)
    from interlace.engine.inline_client import InlineClient

    return InlineClient(
        lambda on_event: start_executor(spec, on_event),
        lambda info: build_core(spec, info, clock),
        clock,
        spec.step_timeout_s,
    )


def start_executor(spec: ResolvedSpec, on_event: OnEvent) -> tuple[Executor, ExecutorInfo]:
    """Build and start the executor: from here on the model is loaded. Raises the true cause; nothing stays behind."""
    executor: Executor = spec.executor.build()
    try:
        return executor, executor.start(spec, on_event)
    except BaseException:
        executor.shutdown()
        raise


def build_core(spec: ResolvedSpec, info: ExecutorInfo, clock: Clock) -> EngineCore:
    """The engine core over a started executor. `clock` serves to account the time spent in the scheduler."""
    return EngineCore(
        spec.scheduler.build(),
        spec.scheduler.name,
        spec.limits,
        info,
        max_model_len=spec.max_model_len,
        prefix_caching=spec.cache.prefix_caching,
        timer=clock.now,
    )
