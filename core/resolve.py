"""`resolve`: from settings and plugins to a `ResolvedSpec`, which the engine core and its workers follow.

Nothing heavy is imported: on a machine without a GPU, resolving needs no torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from interlace.config import LoadedSettings, Settings, parse_memory
from interlace.contracts import CONTRACTS
from interlace.errors import (
    CheckpointError,
    ConfigError,
    PluginContractError,
    PluginError,
    PluginImportError,
    PluginNotFoundError,
)
from interlace.model_config import read_architecture
from interlace.options import check_options, options_table, validate_options
from interlace.registry import Offer, Registry
from interlace.spec import CacheSpec, Component, GpuSpec, ResolvedSpec, SchedulerLimits

if TYPE_CHECKING:
    from interlace.interfaces.checkpoint import Checkpoint
    from interlace.model_config import ModelConfig
    from interlace.plugin_manager import PluginManager
    from interlace.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 8192
"""Cap of `max_model_len` where it is not set: one request of that length fits a modest KV cache."""

_BFLOAT16_CAPABILITY = (8, 0)
_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


def resolve(loaded: LoadedSettings, plugins: PluginManager) -> ResolvedSpec:
    """Choose every component, read the model's configuration, settle what was `auto`.

    Raises the plugin errors, `ConfigError`, `ModelNotFoundError` or `CheckpointError`; imports no model code."""
    from interlace.catalog import resolve_model

    settings = loaded.settings
    selected = select_components(loaded, plugins)
    found = resolve_model(settings.model)
    checkpoint = _choose_checkpoint(loaded, plugins.registry("checkpoints"), Path(found.path))
    raw = _open(checkpoint, Path(found.path)).raw_config()
    where = f"the architecture of model '{settings.model}', {found.path}"
    architecture = plugins.registry("models").get(read_architecture(raw, str(found.path)), where)
    config = architecture.model_config(raw, str(found.path))
    hosted = selected["executors"][0].make_host() is not None
    device = settings.device if hosted and settings.device != "auto" else resolve_device(settings.device)
    spec = ResolvedSpec(
        model=settings.model,
        model_path=str(found.path),
        model_config=config,
        checkpoint=checkpoint,
        architecture=architecture.component(reason=f"architecture {config.architecture}"),
        scheduler=selected["schedulers"][0],
        executor=selected["executors"][0],
        attention=selected["attention"],
        kernels=selected["kernels"],
        logits_processors=selected["logits_processors"],
        limits=_limits(settings),
        cache=_cache(settings, device),
        gpu=GpuSpec(
            graphs=settings.gpu.graphs,
            graph_sizes=tuple(settings.gpu.graph_sizes),
            steps_in_flight=settings.gpu.steps_in_flight,
        ),
        dtype=resolve_dtype(settings.dtype, device),
        weights=settings.weights,
        max_model_len=_max_model_len(loaded, config),
        device=device,
        threads=settings.threads,
        seed=settings.seed,
        deterministic=settings.deterministic,
        step_timeout_s=settings.engine.step_timeout_s,
        router=selected["routers"][0],
    )
    if settings.engine.process == "subprocess":
        check_portable(spec)
    for warning in filter(None, (part.deprecation for part in (*spec.components, *selected["routers"]))):
        logger.warning("%s", warning)
    return spec


def select_components(loaded: LoadedSettings, plugins: PluginManager) -> dict[str, tuple[Component, ...]]:
    """Kind → what the settings select, for the kinds that do not depend on the model; all given options checked."""
    chosen: dict[str, tuple[Component, ...]] = {}
    for kind in ("schedulers", "executors", "attention", "kernels", "logits_processors", "routers"):
        registry = plugins.registry(kind)
        section = getattr(loaded.settings, CONTRACTS[kind].section)
        key = f"{CONTRACTS[kind].section}.use"
        if section.use == "auto":
            chosen[kind] = tuple(_auto(loaded, registry, section.auto_order))
            continue
        names = section.use if isinstance(section.use, list) else [section.use]
        chosen[kind] = _named(loaded, registry, names, key)
    chosen["schedulers"] = tuple(_with_used(loaded, plugins, scheduler) for scheduler in chosen["schedulers"])
    # Last, so that of a plugin that is not installed its selection is reported and not its options.
    for kind, contract in CONTRACTS.items():
        if contract.section:
            check_options(loaded, plugins.registry(kind))
    return chosen


def open_tokenizer(loaded: LoadedSettings, spec: ResolvedSpec) -> Tokenizer:
    """The model's tokenizer, with the chat template of the settings if they name one."""
    tokenizer = spec.open_checkpoint().tokenizer()
    template = loaded.settings.chat_template
    if template is None:
        return tokenizer
    try:
        return tokenizer.with_chat_template(Path(template).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        source = loaded.source("chat_template")
        raise ConfigError(f"chat_template = '{template}' ({source}) cannot be read: {error}") from error


def check_portable(spec: ResolvedSpec) -> None:
    """Raise `PluginImportError` if a component lives in `__main__` and thus cannot be imported by a subprocess."""
    for part in spec.components:
        if part.target.startswith("__main__:"):
            raise PluginImportError(
                f"{part.owner} is the class '{part.target}': a class defined in __main__ exists in that process only. "
                "Move it into a module that can be imported, or set engine.process = 'inline'"
            )


def resolve_device(device: str) -> str:
    """`auto` settled. torch is imported only where there are signs of a GPU, or one is asked for."""
    if device == "cpu" or (device == "auto" and not any(Path(file).exists() for file in _GPU_FILES)):
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise ConfigError(f"device = '{device}': torch {torch.__version__} sees {count} CUDA devices here")
    return device


def resolve_dtype(dtype: str, device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """`auto` settled: bfloat16 on GPUs and CPUs that multiply it natively, else float16 on GPUs and float32 on CPUs."""
    if dtype != "auto":
        return dtype
    if device != "cpu":
        return "float16" if _capability(device) < _BFLOAT16_CAPABILITY else "bfloat16"
    flags = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    return "bfloat16" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) else "float32"


def _capability(device: str) -> tuple[int, int]:
    """Compute capability of a GPU; that of the first with bfloat16 where torch sees none."""
    import torch

    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else _BFLOAT16_CAPABILITY


def model_limit(config: ModelConfig) -> int:
    """Most tokens the model is made for: its positions, stretched where rope scaling states the original length."""
    original = config.rope.get("original_max_position_embeddings")
    if config.rope.get("rope_type") in ("linear", "dynamic", "yarn") and original:
        return max(config.max_position_embeddings, int(original * config.rope.get("factor", 1.0)))
    return config.max_position_embeddings


def _max_model_len(loaded: LoadedSettings, config: ModelConfig) -> int:
    limit = model_limit(config)
    wanted = loaded.settings.max_model_len
    if wanted is None:
        return min(limit, DEFAULT_MAX_MODEL_LEN)
    if wanted > limit:
        raise ConfigError(
            f"max_model_len = {wanted} ({loaded.source('max_model_len')}): model '{loaded.settings.model}' is made for "
            f"at most {limit} tokens. Allowed: 1 to {limit}"
        )
    return wanted


def _auto(loaded: LoadedSettings, registry: Registry, order: list[str]) -> Iterator[Component]:
    """What `auto` asks, in order, without names that are not installed."""
    section = CONTRACTS[registry.kind].section
    installed = [name for name in order if name in registry]
    if not installed:
        raise PluginNotFoundError(
            f"{section}.use = 'auto', but nothing of {section}.auto_order = {order} is installed. Installed "
            f"{registry.kind}: {', '.join(registry.names()) or 'none'}"
        )
    for place, name in enumerate(installed, start=1):
        offer = registry.get(name, f"{section}.auto_order")
        component = _component(loaded, offer, name, f"auto, choice {place} of {len(installed)}")
        yield msgspec.structs.replace(component, automatic=True)


def _named(loaded: LoadedSettings, registry: Registry, names: Sequence[str], key: str) -> tuple[Component, ...]:
    """What `key` of the configuration names, in its order."""
    reason = f"{key}, {loaded.source(key)}"
    offers = [registry.get(name, reason) for name in names]
    for place, offer in enumerate(offers):
        if offer in offers[:place]:
            raise ConfigError(f"{key} ({loaded.source(key)}) names {offer.component().owner} twice: leave one out")
    return tuple(_component(loaded, offer, name, reason) for offer, name in zip(offers, names, strict=True))


def _component(loaded: LoadedSettings, offer: Offer, given_name: str, reason: str) -> Component:
    """The offer with its options, under the name the configuration gives it: two packages' may serve side by side."""
    if CONTRACTS[offer.kind].light:
        offer.load()
    component = offer.component(validate_options(loaded, offer, given_name), reason)
    return msgspec.structs.replace(component, name=given_name)


def _with_used(
    loaded: LoadedSettings, plugins: PluginManager, component: Component, within: tuple[str, ...] = ()
) -> Component:
    """`component` with the plugins that its options name (see `Scheduler.uses`), and those with theirs."""
    owner = component.owner
    if owner in within:
        raise ConfigError(f"{', which uses '.join((*within, owner))}: no plugin can use itself")
    declared: dict[str, str] = dict(getattr(component.load(), "uses", {}))
    uses = {}
    for option, kind in declared.items():
        offer = plugins.registry(component.kind).get(component.name)
        key = f"{options_table(loaded, offer, component.name)}.{option}"
        if kind not in CONTRACTS or option not in component.options:
            raise PluginContractError(
                f"{owner} declares that its option '{option}' names {kind}: it should be an option of its own, and the "
                f"kind one of {', '.join(CONTRACTS)}"
            )
        parts = _named(loaded, plugins.registry(kind), _as_names(component.options[option], owner, option), key)
        uses[option] = tuple(_with_used(loaded, plugins, part, (*within, owner)) for part in parts)
    return msgspec.structs.replace(component, uses=uses) if uses else component


def _as_names(value: Any, owner: str, option: str) -> list[str]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise PluginContractError(f"{owner}: its option '{option}' names plugins, so it should be text or a list of it")
    return names


def _choose_checkpoint(loaded: LoadedSettings, registry: Registry, path: Path) -> Component:
    use = loaded.settings.checkpoint.use
    if use != "auto":
        reason = f"checkpoint.use, {loaded.source('checkpoint.use')}"
        return _component(loaded, registry.get(use, reason), use, reason)
    # Built-in formats first: installing a package must not change how a known format is read.
    offers = sorted(registry, key=lambda offer: offer.origin.package != "interlace")
    for offer in offers:
        try:
            matches = offer.load().matches(path)
        except PluginError as error:
            logger.warning("%s is passed over: %s", offer.component().owner, error)
            continue
        if matches:
            return _component(loaded, offer, offer.name, f"recognises {path.name}")
    formats = ", ".join(offer.name for offer in offers) or "none"
    raise CheckpointError(
        f"{path}: no checkpoint format recognises it. Installed formats: {formats}. A model is a directory with "
        "config.json and safetensors files, or a GGUF file; checkpoint.use names the format outright"
    )


def _open(component: Component, path: Path) -> Checkpoint:
    target = component.load()
    opened: Checkpoint = target(component.load_options(target), path)
    return opened


def _limits(settings: Settings) -> SchedulerLimits:
    scheduler = settings.scheduler
    return SchedulerLimits(
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        long_prefill_token_threshold=scheduler.long_prefill_token_threshold,
        watermark=scheduler.watermark,
        reserve_full_prompt=scheduler.reserve_full_prompt,
        starvation_timeout_s=scheduler.starvation_timeout_s,
    )


def _cache(settings: Settings, device: str) -> CacheSpec:
    given = settings.cache.memory
    # What else runs on a machine needs main memory; a GPU is there for the engine.
    automatic = CacheSpec().memory_share if device == "cpu" else 0.9
    memory = automatic if given == "auto" else parse_memory(given)
    return CacheSpec(
        block_size=settings.cache.block_size,
        prefix_caching=settings.cache.prefix_caching,
        memory_bytes=memory if isinstance(memory, int) else None,
        memory_share=memory if isinstance(memory, float) else automatic,
        max_blocks=settings.cache.max_blocks,
    )
