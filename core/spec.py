"""`ResolvedSpec`: everything the engine core and its workers need to know, as plain data.

Made once by `interlace.assemble` in the process that starts the engine, and followed by the others without
discovering plugins, reading the environment or the configuration again. It carries no API keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from interlace.contracts import CONTRACTS, check_version, deprecation, load_class, load_target
from interlace.errors import InterlaceError, PluginError
from interlace.model_config import ModelConfig

if TYPE_CHECKING:
    from interlace.interfaces.checkpoint import Checkpoint
    from interlace.interfaces.host import Host


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """One chosen provider with its validated options."""

    kind: str
    name: str
    target: str
    api: str | None = None
    """Version of the contract the target is written for; None: the current one."""
    options: dict[str, Any] = {}
    package: str = ""
    version: str = ""
    reason: str = ""
    """Why it was chosen, for the start-up log."""
    automatic: bool = False
    """One of those that `auto` asks; its class may say that it should not be (`auto_refusal`)."""
    uses: dict[str, tuple[Component, ...]] = {}
    """Option → the plugins of other kinds that it names, in order (see `Scheduler.uses`)."""
    host: str | None = None
    """As of `Provider`."""

    @property
    def owner(self) -> str:
        """How messages call it: kind, name, package and version."""
        return f"{CONTRACTS[self.kind].noun} '{self.name}' ({f'{self.package} {self.version}'.strip()})"

    @property
    def contract_version(self) -> str:
        """Version of the contract the target is written for."""
        return CONTRACTS[self.kind].version if self.api is None else self.api

    @property
    def label(self) -> str:
        """Its name, and those of the plugins it uses: `ordered (priority, fcfs)`."""
        used = ", ".join(part.label for parts in self.uses.values() for part in parts)
        return f"{self.name} ({used})" if used else self.name

    @property
    def family(self) -> tuple[Component, ...]:
        """Itself and all it uses."""
        return (self, *(member for parts in self.uses.values() for part in parts for member in part.family))

    def load(self) -> Any:
        """Import the target class and check that it keeps its contract; one written for a former version is adapted.

        Raises `PluginImportError` (cause chained) or `PluginContractError` (naming the missing methods)."""
        return load_class(self.kind, self.target, self.contract_version, self.owner, self.package)

    def check_version(self) -> None:
        """Raise `PluginContractError` if the version is unknown or no longer understood; imports nothing."""
        check_version(self.kind, self.contract_version, self.owner, self.package)

    @property
    def deprecation(self) -> str | None:
        """What to warn of if the target is written for a former version of its contract."""
        return deprecation(self.kind, self.contract_version, self.owner, self.package)

    def load_options(self, target: Any) -> Any:
        """The options as an instance of the target's own `Options` model."""
        return target.Options(**self.options)

    def build(self, *arguments: Any) -> Any:
        """Import the class and make an instance from its options, `arguments`, and the plugins it uses.

        Raises what `load` raises; `PluginError`, cause chained, when making the instance fails."""
        target = self.load()
        used = {option: [part.build() for part in parts] for option, parts in self.uses.items()}
        with self.blamed():
            return target(self.load_options(target), *arguments, **used)

    def make_host(self) -> Host | None:
        """Where engines with this executor run; None: beside their front. Raises as `build` does."""
        if self.host is None:
            return None
        make = load_target(self.host, f"the host of {self.owner}")
        with self.blamed():
            host: Host | None = make(self.options)
        return host

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Code of the plugin runs while the engine is set up: whatever it raises that is no error of Interlace becomes
        a `PluginError` which names the plugin, with the cause chained."""
        try:
            yield
        except InterlaceError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.owner} cannot be set up: {type(error).__name__}: {error}") from error


class SchedulerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Budgets the core enforces, whatever the policy."""

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    long_prefill_token_threshold: int = 0
    watermark: float = 0.01
    reserve_full_prompt: bool = True
    starvation_timeout_s: float = 60.0
    """The watchdog names the policy when a request has waited longer than this while others were planned."""


class CacheSpec(msgspec.Struct, frozen=True, kw_only=True):
    """KV cache settings."""

    block_size: int = 32
    prefix_caching: bool = True
    memory_bytes: int | None = None
    """Exact budget; None: `memory_share` of the free memory."""
    memory_share: float = 0.4
    max_blocks: int | None = None
    """Upper limit on the number of blocks; for tests."""


class GpuSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker on a GPU runs its steps."""

    graphs: bool = True
    graph_sizes: tuple[int, ...] = ()
    """Numbers of rows; empty: `interlace.worker.graphs.SIZES`."""
    steps_in_flight: int = 2


class ResolvedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One engine, resolved."""

    model: str
    """The name the user gave, for messages and the `model` field of outputs."""
    model_path: str
    model_config: ModelConfig
    checkpoint: Component
    architecture: Component
    scheduler: Component
    executor: Component
    attention: tuple[Component, ...]
    """Candidates in the order to ask; the worker takes, per KV group, the first that supports it."""
    kernels: tuple[Component, ...]
    """Candidates in the order to ask, per op; the reference of the contract always comes last."""
    logits_processors: tuple[Component, ...] = ()
    limits: SchedulerLimits = SchedulerLimits()
    cache: CacheSpec = CacheSpec()
    gpu: GpuSpec = GpuSpec()
    dtype: str = "float32"
    """Compute type, resolved: float32, bfloat16 or float16."""
    weights: str = "auto"
    max_model_len: int = 2048
    device: str = "cpu"
    threads: int = 0
    """0: one per core this process may use."""
    seed: int | None = None
    deterministic: bool = False
    step_timeout_s: float = 120.0
    """A step that takes longer is hung."""
    router: Component | None = None
    """Runs in the front only."""
    replica: int = 0
    """Which of `num_replicas` equal engines this is. Their `threads`, `cache` and `device` are already what
    `interlace.engine.sharing` dealt to each; where their executor has a host, that settles them on the spot."""
    num_replicas: int = 1
    part: int = 0
    """Which of `num_parts` equal parts of this machine's processors is this engine's, where it binds itself to some."""
    num_parts: int = 1

    def open_checkpoint(self) -> Checkpoint:
        """The checkpoint, for its tokenizer (in the front) or its weights (in a worker)."""
        target = self.checkpoint.load()
        opened: Checkpoint = target(self.checkpoint.load_options(target), Path(self.model_path))
        return opened

    @property
    def components(self) -> tuple[Component, ...]:
        """Everything chosen, candidates and what the scheduler uses included."""
        parts = (self.architecture, self.checkpoint, *self.scheduler.family, self.executor)
        return (*parts, *self.attention, *self.kernels, *self.logits_processors)
