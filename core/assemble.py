"""The composition root: the only place where an engine is put together from its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from interlace.clock import Clock, MonotonicClock
from interlace.config import LoadedSettings
from interlace.engine.client import EngineClient, OnEvent
from interlace.engine.core import EngineCore
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
    client = make_client(spec, process, clock)
    if supervised and process == "subprocess":
        from interlace.engine.supervisor import Supervisor

        client = Supervisor(
            lambda: make_client(spec, process, clock), clock, engine.max_restarts, engine.restart_window_s
        )
    return Assembly(loaded, spec, manager, open_tokenizer(loaded, spec), client, clock)


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
