"""transformers on the work of gpu_model_speed.py: static cache, compiled as it compiles itself, and its own continuous
batching."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import transformers
from gpu_jobs import Outcome, Table
from gpu_model_speed import CONTEXT
from gpu_shapes import LARGE_MODELS

_FEW, _MANY = 8, 40
"""Tokens of two runs, whose difference is decoding alone."""


def _model(name: str, attention: str) -> Any:
    raw = {key: value for key, value in LARGE_MODELS[name].items() if key not in ("architectures", "model_type")}
    config = transformers.LlamaConfig(**raw)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    return model.eval()


def _prompts(size: int) -> list[list[int]]:
    source = random.Random(size)
    return [[source.randrange(1000, 120000) for _ in range(CONTEXT)] for _ in range(size)]


def _table(title: str) -> Table:
    return Table(title, ["batch", "ms per step", "tokens/s", "Interlace ms", "ratio"])


def _add(table: Table, name: str, size: int, seconds: float, values: dict[str, float]) -> None:
    own = values.get(f"{name} decode ms at {size}")
    table.add(size, 1e3 * seconds, size / seconds, own, 1e3 * seconds / own if own else None)


@torch.inference_mode()
def static_cache(name: str, sizes: list[int], quick: bool, values: dict[str, float]) -> Outcome:
    """`generate` with a static cache; compiled unless `quick`."""
    outcome, model = Outcome(), _model(name, "sdpa")
    how = "not compiled" if quick else "compiled"
    table = _table(f"transformers {transformers.__version__}, static cache, {how}, {name} decode")
    outcome.tables.append(table)
    for size in sizes:
        given = torch.tensor(_prompts(size), device="cuda")

        def run(count: int, given: torch.Tensor = given) -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, cache_implementation="static", disable_compile=quick, pad_token_id=0,
            )  # fmt: skip
            torch.cuda.synchronize()
            assert found.shape[1] == given.shape[1] + count, f"{found.shape[1] - given.shape[1]} tokens of {count}"
            return time.perf_counter() - began

        for count in (_FEW, _MANY):  # a cache of another length compiles anew
            run(count)
        _add(table, name, size, (run(_MANY) - run(_FEW)) / (_MANY - _FEW), values)
    return outcome


@torch.inference_mode()
def continuous(name: str, sizes: list[int], values: dict[str, float]) -> Outcome:
    """`generate_batch` with all prompts at once."""
    outcome, model = Outcome(), _model(name, "sdpa")
    table = _table(f"transformers {transformers.__version__}, continuous batching, {name} decode")
    outcome.tables.append(table)
    for size in sizes:
        prompts = _prompts(size)

        def run(count: int, prompts: list[list[int]] = prompts) -> float:
            config = transformers.GenerationConfig(
                max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
            )
            torch.cuda.synchronize()
            began = time.perf_counter()
            found = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
            seconds = time.perf_counter() - began
            given = [len(answer.generated_tokens) for answer in found.values()]
            assert given == [count] * len(prompts), f"answers of {sorted(set(given))} tokens, not {count}"
            return seconds

        run(_FEW)
        _add(table, name, size, (run(_MANY) - run(_FEW)) / (_MANY - _FEW), values)
    return outcome
