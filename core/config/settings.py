"""Every setting of Interlace, typed, bounded and described. The descriptions become docs/config.md.

`Settings()` is the defaults and nothing else: which files, variables and flags are read is decided by
`interlace.config.load_settings`, which also remembers where each value came from.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}

Options = dict[str, dict[str, Any]]
"""Plugin name → that plugin's options; validated against its own Options model when it is selected."""


def parse_memory(text: str) -> int | float:
    """Bytes as an int ("2GiB", "500MB", "4096") or a share of the free memory as a float ("0.4", "40%").

    Raises `ValueError` when `text` is neither."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*|%)\s*", text)
    if match and match[2] == "%":
        share = float(match[1]) / 100
        if 0 < share <= 1:
            return share
    elif match and not match[2] and "." in match[1]:
        share = float(match[1])
        if 0 < share <= 1:
            return share
    elif match and match[2] in _UNITS and float(match[1]) * _UNITS[match[2]] >= 1:
        return int(float(match[1]) * _UNITS[match[2]])
    raise ValueError("should be a size such as '2GiB' or '500MB', or a share of the free memory such as 0.4 or '40%'")


def _memory_text(value: Any) -> Any:
    """Numbers are welcome where sizes are written: 2147483648 (bytes) and 0.4 (a share)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = str(value) if is_number else value
    if isinstance(text, str):
        parse_memory(text)
        return str(text)
    return value


def _cache_memory_text(value: Any) -> Any:
    """As `_memory_text`, or `auto`."""
    return value if value == "auto" else _memory_text(value)


def _size_text(value: Any) -> Any:
    """As `_memory_text`, but a share of something makes no sense here."""
    text = _memory_text(value)
    if isinstance(text, str) and isinstance(parse_memory(text), float):
        raise ValueError("should be a size such as '4MiB' or '500KB', not a share")
    return text


def _reject_bool(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """`seed = true` is a mistake, not the number 1."""
    if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
        raise ValueError("true and false are not allowed here")
    return value


class Section(BaseModel):
    """One table of the configuration. Not a pydantic-settings class: those merge their sources themselves, and cannot
    say afterwards which one gave a value."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    _no_bool = field_validator("*", mode="before")(classmethod(_reject_bool))


class SchedulerSettings(Section):
    """Which policy composes the steps, and the budgets it works under."""

    use: str = Field(default="fcfs", description="Scheduling policy: the name of a scheduler plugin.")
    max_num_batched_tokens: int = Field(
        default=2048, ge=1, description="Token budget of a step, prefill and decode together."
    )
    max_num_seqs: int = Field(default=256, ge=1, description="How many requests may run at the same time.")
    long_prefill_token_threshold: int = Field(
        default=0, ge=0, description="Cap on one request's prefill tokens in one step; 0: no cap."
    )
    watermark: float = Field(
        default=0.01, ge=0.0, lt=1.0, description="Share of the KV blocks kept free when a request is admitted."
    )
    reserve_full_prompt: bool = Field(
        default=True, description="Admit a request only when its whole prompt fits, not merely its first chunk."
    )
    starvation_timeout_s: float = Field(
        default=60.0,
        gt=0.0,
        description="Seconds a request may wait while others are planned before the watchdog reports it.",
    )
    options: Options = Field(default={}, description="Options of scheduler plugins, by plugin name.")


class OrderingSettings(Section):
    """Orderings are named by an option of the scheduler that combines them; here are their own options."""

    options: Options = Field(default={}, description="Options of ordering plugins, by plugin name.")


class AttentionSettings(Section):
    """Which attention backend computes each KV group."""

    use: str = Field(
        default="auto",
        description="`auto`, or the name of an attention plugin. `auto` asks the backends of `auto_order`.",
    )
    auto_order: list[str] = Field(
        default=["native", "flash", "triton", "triton_invariant", "torch"],
        description="Backends `auto` asks, best first; names that are not installed are skipped, and installed ones "
        "that are not listed take no part.",
    )
    options: Options = Field(default={}, description="Options of attention plugins, by plugin name.")


class KernelSettings(Section):
    """Which fused kernels layers and sampler are made of."""

    use: str = Field(
        default="auto",
        description="`auto`, or the name of a kernels plugin. `auto` asks those of `auto_order`, op by op.",
    )
    auto_order: list[str] = Field(
        default=["native", "triton", "torch"],
        description="Kernel sets `auto` asks, best first; names that are not installed are skipped, and installed "
        "ones that are not listed take no part.",
    )
    options: Options = Field(default={}, description="Options of kernels plugins, by plugin name.")


class ExecutorSettings(Section):
    """What runs the steps, on how many processes and devices."""

    use: str = Field(default="uniprocess", description="The name of an executor plugin.")
    options: Options = Field(default={}, description="Options of executor plugins, by plugin name.")


class CheckpointSettings(Section):
    """How the model's files are read."""

    use: str = Field(
        default="auto",
        description="`auto` (the first format that recognises the files), or the name of a checkpoint plugin.",
    )
    options: Options = Field(default={}, description="Options of checkpoint plugins, by plugin name.")


class LogitsProcessorSettings(Section):
    """Which logits processors requests may name."""

    use: list[str] = Field(default=[], description="Names of the logits processor plugins to load.")
    options: Options = Field(default={}, description="Options of logits processor plugins, by plugin name.")


class RouterSettings(Section):
    """What chooses a replica for each request, where there are several."""

    use: str = Field(default="prefix_affinity", description="The name of a router plugin.")
    options: Options = Field(default={}, description="Options of router plugins, by plugin name.")


class CacheSettings(Section):
    """The KV cache."""

    block_size: int = Field(default=32, ge=1, le=1024, description="Tokens in a KV block.")
    prefix_caching: bool = Field(default=True, description="Keep blocks of finished requests and reuse equal prefixes.")
    memory: Annotated[str, BeforeValidator(_cache_memory_text)] = Field(
        default="auto",
        description="Memory for the KV cache: a size (`2GiB`, `500MB`, a number of bytes) or a share of the memory "
        "that is free once the weights are loaded (`0.4`, `40%`), on a GPU also beside what the largest step takes. "
        "`auto`: 0.4 on CPU, 0.9 on a GPU. Replicas on one device divide it evenly.",
    )
    max_blocks: int | None = Field(
        default=None, ge=2, description="Upper limit on the number of KV blocks, whatever fits."
    )


class GpuSettings(Section):
    """How steps run on a GPU. The CPU has none of this."""

    graphs: bool = Field(
        default=True,
        description="Run steps in which every request decodes as CUDA graphs, where the attention backend can.",
    )
    graph_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        default=[],
        description="Numbers of requests that graphs are captured for, each when it is first needed; a step is padded "
        "to the next one, and one beyond the largest runs without. Empty: 1 to 512, close together.",
    )
    steps_in_flight: int = Field(
        default=2,
        ge=1,
        le=4,
        description="Steps given to the GPU before the first one's tokens are awaited: with 2 it never waits for the "
        "host, and a request that stops has been computed one step further.",
    )


class EngineSettings(Section):
    """Where the engine core runs, and how it is watched."""

    process: Literal["auto", "inline", "subprocess"] = Field(
        default="auto",
        description="`inline`: a thread of this process. `subprocess`: a child. `auto`: inline for `LLM`, a child for "
        "`serve` and where there are several `replicas`.",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Equal engines side by side, each a supervised process with the whole model. They divide `threads` "
        "and, on one device, `cache.memory`; a router (`router.use`) gives each request to one of them.",
    )
    step_timeout_s: float = Field(
        default=120.0,
        gt=0.0,
        description="A step that takes longer is hung: the scheduler's state is logged and the engine is stopped (and "
        "restarted where it is a child).",
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="How often within `restart_window_s` a dead engine process is started again; then the server gives "
        "up. Applies to `serve`, and to each of several replicas; 0: never.",
    )
    restart_window_s: float = Field(default=300.0, gt=0.0, description="See `max_restarts`.")


class ServerSettings(Section):
    """The HTTP server."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0: any free one.")
    unix_socket: str | None = Field(default=None, description="Path of a unix socket to listen on instead.")
    root_path: str = Field(default="", description="Path prefix under which a reverse proxy serves us.")
    served_model_names: list[str] = Field(
        default=[], description="Names clients may use for the model, the first one in answers. Empty: the model's own."
    )
    api_keys: list[SecretStr] = Field(
        default=[], description="Keys clients may present. Never printed, never sent to workers."
    )
    api_keys_file: str | None = Field(
        default=None, description="File with one key per line (`#` starts a comment), in addition to `api_keys`."
    )
    allow_anonymous: bool = Field(
        default=False, description="Serve beyond the loopback address although there are no API keys."
    )
    isolate_keys: bool = Field(
        default=False, description="Requests of different API keys share no cached prefixes (a cache salt per key)."
    )
    cors_origins: list[str] = Field(
        default=[], description="Origins whose pages may call the API from a browser; `*`: all. Empty: CORS is off."
    )
    tls_certificate: str | None = Field(default=None, description="PEM file with the TLS certificate (chain).")
    tls_key: str | None = Field(default=None, description="PEM file with the certificate's private key.")
    max_body_size: Annotated[str, BeforeValidator(_size_text)] = Field(
        default="4MiB", description="Largest request body; more is answered 413."
    )
    max_waiting: int = Field(
        default=1024, ge=0, description="Requests that may wait in the engine; one more is answered 503. 0: no limit."
    )
    client_timeout_s: float = Field(
        default=30.0, ge=0.0, description="A client has this long to send a whole request. 0: no limit."
    )
    request_timeout_s: float = Field(
        default=600.0, ge=0.0, description="A request that is not finished by then ends with an error. 0: no limit."
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0.0, description="After SIGTERM, how long requests under way may still take."
    )
    sse_keep_alive_s: float = Field(
        default=15.0, ge=0.0, description="A silent stream gets a comment line this often, for proxies. 0: never."
    )
    access_log: bool = Field(
        default=True, description="Log one line per HTTP request (except `/health` and other probes that went well)."
    )
    log_prompts: bool = Field(default=False, description="Put the bodies of requests and answers into the log.")
    log_format: Literal["text", "json"] = Field(default="text", description="Form of the server's log lines.")
    log_file: str | None = Field(default=None, description="Write the log to this file, too.")
    metrics: bool = Field(default=True, description="Serve Prometheus metrics at `/metrics`.")
    metrics_compat: Literal["none", "vllm"] = Field(
        default="none", description="`vllm`: the same metrics under vLLM's names, too, for existing dashboards."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="Send OpenTelemetry traces to this OTLP endpoint; needs `interlace[otel]`."
    )
    docs: bool = Field(default=True, description="Serve the OpenAPI description and its pages at `/docs`.")
    page: bool = Field(default=True, description="Serve the chat and live view page at `/`.")


class PluginSettings(Section):
    """Which installed packages take part. Names are those of distributions (what pip installs)."""

    allow: list[str] = Field(
        default=[],
        description="If not empty, plugins of only these distributions (and the built-in ones) are imported.",
    )
    block: list[str] = Field(
        default=[],
        description="Distributions, or `distribution:entry_point`, that are never imported; stronger than `allow`.",
    )
    require: list[str] = Field(
        default=[],
        description="Requirements such as `interlace-sjf>=0.2` that must be installed and load, or nothing starts.",
    )

    @field_validator("require")
    @classmethod
    def _requirements(cls, values: list[str]) -> list[str]:
        if not values:
            return values
        from packaging.requirements import InvalidRequirement, Requirement  # slow to import, seldom needed

        for value in values:
            try:
                Requirement(value)
            except InvalidRequirement:
                raise ValueError(f"'{value}' is not a requirement such as 'interlace-sjf>=0.2'") from None
        return values


class Settings(Section):
    """All settings of one engine."""

    model: str = Field(
        default="smollm2", description="A name from `interlace models`, a file or directory, or a Hugging Face hub id."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type to compute in. `auto`: bfloat16 where the hardware has it, else float32 (on a GPU float16).",
    )
    weights: Literal["auto", "as-shipped", "bf16", "int8", "float32"] = Field(
        default="auto",
        description="How linear weights are kept in memory. `as-shipped`: blocks of a GGUF file stay blocks. "
        "`int8`: quantised at start. `auto`: in float32 if that is the compute type, a GGUF file's blocks being "
        "decoded exactly; else a GGUF file's blocks as shipped where the kernels compute with them, and all other "
        "weights in the compute type.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt plus output, in tokens. Unset: what the model was trained for, at most 8192.",
    )
    device: str = Field(default="auto", description="`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.")
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads to compute with, over all replicas; 0: one per core this process may use, at most its "
        "CPU quota.",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="Seed for requests that state none. Unset: a new one each start."
    )
    deterministic: bool = Field(
        default=False,
        description="Allow only kernels whose result does not depend on what else is in the batch, and "
        "have tensor ranks exchange so that any number of them gives the same bits.",
    )
    chat_template: str | None = Field(
        default=None, description="File with a jinja chat template, instead of the one shipped with the model."
    )
    scheduler: SchedulerSettings = Field(default=SchedulerSettings(), description="Scheduling policy and budgets.")
    orderings: OrderingSettings = Field(default=OrderingSettings(), description="Orderings that schedulers combine.")
    attention: AttentionSettings = Field(default=AttentionSettings(), description="Attention backends.")
    kernels: KernelSettings = Field(default=KernelSettings(), description="Fused kernels.")
    executor: ExecutorSettings = Field(default=ExecutorSettings(), description="Executor.")
    checkpoint: CheckpointSettings = Field(default=CheckpointSettings(), description="Checkpoint format.")
    logits_processors: LogitsProcessorSettings = Field(
        default=LogitsProcessorSettings(), description="Logits processors."
    )
    router: RouterSettings = Field(default=RouterSettings(), description="Router of requests to replicas.")
    cache: CacheSettings = Field(default=CacheSettings(), description="KV cache.")
    gpu: GpuSettings = Field(default=GpuSettings(), description="Steps on a GPU.")
    engine: EngineSettings = Field(default=EngineSettings(), description="Engine process.")
    server: ServerSettings = Field(default=ServerSettings(), description="HTTP server.")
    plugins: PluginSettings = Field(default=PluginSettings(), description="Plugin packages.")

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("should be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        return value
