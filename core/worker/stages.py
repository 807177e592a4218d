"""How many layers each pipeline stage gets. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from interlace.errors import ConfigError
from interlace.model_config import ModelConfig

OPTION = "executor option pipeline_layers"


def deal_layers(config: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, such that in decoding the slowest takes as little time as it can.

    Time is taken to be that of the weights a token meets: all of a layer, all of the head on the last stage, and of the
    embedding a row, which is nothing. Stages before the last differ by one layer at most, the first ones having more.
    With fewer layers than stages it is one each, which `check_pipeline` refuses."""
    if num_stages >= config.num_layers:
        return (1,) * num_stages
    head = weigh_head(config) / weigh_layer(config)
    first = num_stages - 1
    best: tuple[float, float, int] | None = None
    dealt: tuple[int, ...] = (config.num_layers,)
    for last in range(1, config.num_layers - first + 1) if first else ():
        each, more = divmod(config.num_layers - last, first)
        counts = (*((each + 1,) * more), *((each,) * (first - more)), last)
        times = (*counts[:-1], last + head)
        key = (max(times), sum(time * time for time in times), -last)  # of equals, the one with the evener KV cache
        if best is None or key < best:
            best, dealt = key, counts
    return dealt


def check_layers(given: Sequence[int], config: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage as the user gave them. Raises `ConfigError` if they are not those of the model."""
    if len(given) != num_stages:
        raise ConfigError(
            f"{OPTION} has {len(given)} entries for {num_stages} stages (pipeline_parallel); give one per stage, or "
            "none"
        )
    if min(given) < 1 or sum(given) != config.num_layers:
        raise ConfigError(
            f"{OPTION} = {list(given)} deals {sum(given)} layers, but the model has {config.num_layers}, and each "
            f"stage needs one; by default it is {list(deal_layers(config, num_stages))}"
        )
    return tuple(given)


def weigh_layer(config: ModelConfig) -> int:
    """Parameters of a decoder layer: four projections of attention, three of a gated feed-forward."""
    query, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    return config.hidden_size * (2 * query + 2 * kv + 3 * config.intermediate_size)


def weigh_head(config: ModelConfig) -> int:
    """Parameters of the output head."""
    return config.vocab_size * config.hidden_size
