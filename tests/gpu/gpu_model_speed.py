"""The engine with models of real shapes and random weights: decode steps against the roofline, what the host costs per
step, prefill in operations. Times are the GPU's own: events at both ends of every step, where the engine submits it."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import torch
from gpu_jobs import Outcome, Table
from gpu_shapes import LARGE_MODELS, write_config
from gpu_speed import median

from interlace import LLM, SamplingParams
from interlace.plugins.checkpoints import dummy
from interlace.worker.device_runner import DeviceRunner

CONTEXT = 1024
_BUDGET = 8192
_TOKENS = 48
"""That all requests generate together, after the last one's prompt."""


class Step:
    """A step as the GPU ran it."""

    def __init__(self, lens: list[int], host_s: float) -> None:
        self.lens = lens
        self.host_s = host_s  # that the engine's thread had computed when it handed the step over
        self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    @property
    def ms(self) -> float:
        return float(self.began.elapsed_time(self.ended))


class Recorder:
    """Notes every step that a device runner of this process submits, while it is entered."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._original: Any = DeviceRunner._hand_over

    def __enter__(self) -> Recorder:
        original, steps = self._original, self.steps

        def hand_over(runner: DeviceRunner, step: Any, works: list[Any]) -> None:
            mark = Step(list(step.plan.num_tokens), time.thread_time())
            steps.append(mark)
            original(runner, step, [mark.began.record, *works, mark.ended.record])

        DeviceRunner._hand_over = hand_over  # type: ignore[method-assign]
        return self

    def __exit__(self, *reason: object) -> None:
        DeviceRunner._hand_over = self._original  # type: ignore[method-assign]

    def take(self) -> list[Step]:
        """The steps since the last call; all of them are complete."""
        torch.cuda.synchronize()
        taken = list(self.steps)
        self.steps.clear()
        return taken


def quick_weights() -> None:
    """Random weights of the dummy checkpoint come from one small pool from now on: billions of true random numbers
    take minutes, and their values do not matter here."""
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    original = dummy._random_tensor

    def tensor(shape: tuple[int, ...], name: str, architecture: str, seed: int) -> torch.Tensor:
        if len(shape) < 2:
            return original(shape, name, architecture, seed)
        count = torch.Size(shape).numel()
        scaled = pool * shape[-1] ** -0.5
        return scaled.repeat(-(-count // len(pool)))[:count].view(shape)

    dummy._random_tensor = tensor


def settings(max_seqs: int) -> dict[str, Any]:
    """Of the engine under measurement."""
    return {
        "checkpoint.use": "dummy",
        "device": "cuda",
        "dtype": "bfloat16",
        "max_model_len": 16384,
        "engine.process": "inline",
        "cache.block_size": 64,
        "cache.prefix_caching": False,
        "scheduler.max_num_seqs": max_seqs,
        "scheduler.max_num_batched_tokens": _BUDGET,
    }


def engine(name: str, sizes: list[int], quick: bool, values: dict[str, float]) -> Outcome:
    """Decode steps at these batch sizes from 1,024 tokens on, and prompts of several lengths."""
    outcome = Outcome()
    config = LARGE_MODELS[name]
    quick_weights()
    began = time.perf_counter()
    with Recorder() as recorder, LLM(write_config(config), **settings(max(sizes))) as llm:
        started = time.perf_counter() - began
        chosen = Table(f"{name} runs with", ["part", "choice", "why"])
        for choice in llm.front.info.selections:
            chosen.add(choice.kind, choice.name, choice.reason)
            if choice.kind == "step":
                error = None if choice.name == "device graphs" else f"{choice.name}: {choice.reason}"
                outcome.check("decoding runs as device graphs", error)
        outcome.tables.append(chosen)
        _generate(llm, recorder, [64], 8)  # compiles
        outcome.tables.append(_decode_table(llm, recorder, name, sizes, values, started, outcome))
        outcome.tables.append(_prefill_table(llm, recorder, name, quick, values))
    return outcome


def _generate(llm: LLM, recorder: Recorder, lengths: list[int], max_tokens: int) -> tuple[list[Step], float]:
    """Run random prompts of these lengths; the steps, and seconds in all."""
    source = random.Random(len(lengths))
    prompts = [{"prompt_token_ids": [source.randrange(1000, 120000) for _ in range(length)]} for length in lengths]
    recorder.take()
    began = time.perf_counter()
    answers = llm.generate(
        prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True), progress=False
    )
    seconds = time.perf_counter() - began
    for answer in answers:
        assert answer.outputs[0].finish_reason == "length", f"a request ended with {answer.outputs[0].finish_reason}"
    return recorder.take(), seconds


def _decode_table(
    llm: LLM,
    recorder: Recorder,
    name: str,
    sizes: list[int],
    values: dict[str, float],
    started: float,
    outcome: Outcome,
) -> Table:
    weights, per_token = weight_bytes(LARGE_MODELS[name]), kv_bytes(LARGE_MODELS[name])
    bandwidth, peak = values.get("bandwidth"), values.get("peak")
    table = Table(
        f"{name} decode, bf16, context {CONTEXT:,} and on (start {started:.0f} s); times in ms",
        ["batch", "step", "on GPU", "gap", "gap %", "host CPU", "tokens/s", "roofline", "% of roofline"],
    )
    for size in sizes:
        # The first prompts decode while the last ones are computed.
        max_tokens = _TOKENS + 2 * -(-size * CONTEXT // _BUDGET)
        steps, _ = _generate(llm, recorder, [CONTEXT] * size, max_tokens)
        pure = [index for index, step in enumerate(steps) if step.lens == [1] * size]
        pairs = [(steps[a], steps[b]) for a, b in itertools.pairwise(pure) if b == a + 1][4:]
        if len(pairs) < 8:
            outcome.check(f"{name}, batch {size}", f"only {len(pairs)} steps in which all requests decode")
            continue
        whole = median([float(a.began.elapsed_time(b.began)) for a, b in pairs])
        busy = median([a.ms for a, _ in pairs])
        gap = sum(float(a.ended.elapsed_time(b.began)) for a, b in pairs) / len(pairs)
        total = sum(float(a.began.elapsed_time(b.began)) for a, b in pairs) / len(pairs)
        host = median([1e3 * (b.host_s - a.host_s) for a, b in pairs])
        assert whole is not None
        roofline = None
        if bandwidth and peak:
            context = CONTEXT + max_tokens / 2  # the earlier ones are ahead of the later ones
            memory = (weights + size * context * per_token) / bandwidth
            roofline = 1e3 * max(memory, size * weights / peak)  # 2 operations per weight of 2 bytes
        share = 100 * roofline / whole if roofline else None
        table.add(size, whole, busy, gap, 100 * gap / total, host, 1e3 * size / whole, roofline, share)
        outcome.values[f"{name} decode ms at {size}"] = whole
    return table


def _prefill_table(llm: LLM, recorder: Recorder, name: str, quick: bool, values: dict[str, float]) -> Table:
    config = LARGE_MODELS[name]
    peak = values.get("peak")
    table = Table(
        f"{name} prefill, bf16, steps of up to {_BUDGET:,} tokens",
        ["prompts", "tokens each", "ms on GPU", "ms in all", "tokens/s", "TFLOP/s on GPU", "% of peak"],
    )
    for count, length in [(8, 1024), (4, 8192)] if quick else [(1, 1024), (16, 1024), (4, 8192), (2, 16000)]:
        steps, seconds = _generate(llm, recorder, [length] * count, 1)
        busy = sum(step.ms for step in steps if sum(step.lens) > count) / 1e3
        operations = count * prefill_operations(config, length)
        share = 100 * operations / busy / peak if peak else None
        table.add(
            count, length, 1e3 * busy, 1e3 * seconds, count * length / seconds, operations / busy / 1e12, share
        )  # fmt: skip
    return table


def weight_bytes(config: dict[str, Any]) -> int:
    """That a decode step reads, in bf16: all but the embedding of the input, of which it reads rows."""
    head = config["vocab_size"] * config["hidden_size"]
    return 2 * (config["num_hidden_layers"] * _layer_weights(config) + head)


def kv_bytes(config: dict[str, Any]) -> int:
    """Of one token's keys and values, in bf16."""
    return 4 * int(config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])


def prefill_operations(config: dict[str, Any], length: int) -> float:
    """Of one prompt: products with weights and causal attention; the head for its last token alone."""
    linear = 2.0 * length * config["num_hidden_layers"] * _layer_weights(config)
    width = config["num_attention_heads"] * config["head_dim"]
    attention = 2.0 * length * (length + 1) * width * config["num_hidden_layers"]
    return linear + attention + 2.0 * config["vocab_size"] * config["hidden_size"]


def _layer_weights(config: dict[str, Any]) -> int:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return int(hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"]))
