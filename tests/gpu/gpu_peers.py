"""transformers on the work of gpu_model_speed.py: static cache, compiled as it compiles itself, and its own continuous
batching."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from typing import Any

import torch
import transformers
from gpu_jobs import Outcome, Table
from gpu_model_speed import CONTEXT
from gpu_shapes import LARGE_MODELS

DEVICE = "cuda"
_FEW, _MANY = 8, 40
"""Tokens that are not timed, and tokens in all."""


def _model(name: str, attention: str) -> Any:
    raw = {key: value for key, value in LARGE_MODELS[name].items() if key not in ("architectures", "model_type")}
    config = transformers.LlamaConfig(**raw)
    with torch.device(DEVICE):
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


class _Watch(transformers.StoppingCriteria):
    """Notes the time of every token; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def static_cache(name: str, sizes: list[int], quick: bool, values: dict[str, float]) -> Outcome:
    """`generate` with a static cache; compiled unless `quick`."""
    outcome, model = Outcome(), _model(name, "sdpa")
    how = "not compiled" if quick else "compiled"
    table = _table(f"transformers {transformers.__version__}, static cache, {how}, {name} decode")
    outcome.tables.append(table)
    for size in sizes:
        given = torch.tensor(_prompts(size), device=DEVICE)

        for _ in range(2):  # the first run compiles
            watch = _Watch()
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=_MANY, min_new_tokens=_MANY,
                do_sample=False, cache_implementation="static", disable_compile=quick, pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([watch]),
            )  # fmt: skip
        assert found.shape[1] == CONTEXT + _MANY, f"{found.shape[1] - CONTEXT} tokens of {_MANY}"
        later = watch.times[_FEW:]
        _add(table, name, size, statistics.median(b - a for a, b in itertools.pairwise(later)), values)
    return outcome


def continuous(name: str, sizes: list[int], values: dict[str, float]) -> Outcome:
    """`generate_batch` with all prompts at once."""
    outcome, model = Outcome(), _model(name, "sdpa")
    table = _table(f"transformers {transformers.__version__}, continuous batching, {name} decode")
    outcome.tables.append(table)
    for size in sizes:
        prompts = _prompts(size)

        tokens = _MANY + 2 * -(-size // 8)  # the first prompts decode while the last ones are computed
        config = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        )
        found = model.generate_batch(prompts, config, record_timestamps=True, progress_bar=False)
        given = [len(answer.generated_tokens) for answer in found.values()]
        assert given == [tokens] * size, f"answers of {sorted(set(given))} tokens, not {tokens}"
        last = max((answer.timestamps for answer in found.values()), key=lambda times: times[0])
        first_end = min(answer.timestamps[-1] for answer in found.values())
        together = [b - a for a, b in itertools.pairwise(last) if b <= first_end]
        assert len(together) >= 8, f"only {len(together)} steps in which all requests decode"
        _add(table, name, size, statistics.median(together[4:]), values)
    return outcome
