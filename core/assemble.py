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
from interlace.interfaces.host import Host
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
    host = spec.executor.make_host()
    if host is not None:
        _check_process(loaded, f"the options of {spec.executor.owner} put the engine {host.describe()}")
    process = default_process if engine.process == "auto" else engine.process
    process = "subprocess" if host is not None else process
    client: EngineClient
    if engine.replicas > 1:
        client = make_replicas(spec, loaded, clock, host)
    elif supervised and process == "subprocess":
        client = supervise(spec, engine, clock, host)
    else:
        client = make_client(spec, process, clock, host)
    return Assembly(loaded, spec, manager, open_tokenizer(loaded, spec), client, clock)


def _check_process(loaded: LoadedSettings, why: str) -> None:
    """Raise `ConfigError` if the engine is to be a thread of this process, although it cannot for the reason given."""
    if loaded.settings.engine.process == "inline":
        raise ConfigError(
            f"{why}, but engine.process = 'inline' ({loaded.source('engine.process')}). Allowed: 'auto' or 'subprocess'"
        )


def make_replicas(spec: ResolvedSpec, loaded: LoadedSettings, clock: Clock, host: Host | None = None) -> EngineClient:
    """A client of `engine.replicas` engines, each supervised in a process of its own, which divide this machine or are
    placed by `host`. Raises `ConfigError`."""
    from interlace.engine.guarded_router import GuardedRouter
    from interlace.engine.replicas import Replicas
    from interlace.engine.sharing import describe_shares, number, share_machine

    engine = loaded.settings.engine
    _check_process(
        loaded, f"engine.replicas = {engine.replicas} ({loaded.source('engine.replicas')}) needs a process for each"
    )
    assert spec.router is not None
    router = GuardedRouter(spec.router.build(), spec.router.name, clock.now)
    specs = share_machine(spec, engine.replicas) if host is None else number(spec, engine.replicas)
    shares = describe_shares(specs) if host is None else host.describe()
    layout = f"{shares}; router {spec.router.name} ({spec.router.reason})"
    block_size = spec.cache.block_size if spec.cache.prefix_caching else 0
    clients = [supervise(one, engine, clock, host) for one in specs]
    return Replicas(clients, router, block_size, layout, clock)


def supervise(spec: ResolvedSpec, engine: EngineSettings, clock: Clock, host: Host | None = None) -> EngineClient:
    """The client of an engine in a process of its own that is started again when it dies."""
    from interlace.engine.supervisor import Supervisor

    make = partial(make_client, spec, "subprocess", clock, host)
    return Supervisor(make, clock, engine.max_restarts, engine.restart_window_s)


def make_client(spec: ResolvedSpec, process: str, clock: Clock, host: Host | None = None) -> EngineClient:
    """The client for `process`: `inline` or `subprocess`, which is beside the front or where `host` says."""
    if process == "subprocess":
        check_portable(spec)
        if host is not None:
            from interlace.engine.process_client import ProcessClient

            return ProcessClient(spec, host.link(spec))
        from interlace.engine.subprocess_client import SubprocessClient

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
