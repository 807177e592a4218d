"""How layers are dealt to pipeline stages: so that the slowest is as fast as can be, the head included."""

from __future__ import annotations

from itertools import product

import msgspec
import pytest

from interlace.errors import ConfigError
from interlace.interfaces.model import Parallel
from interlace.model_config import ModelConfig
from interlace.worker.stages import check_layers, deal_layers, weigh_head, weigh_layer

SMOLLM2 = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    norm_eps=1e-5,
    max_position_embeddings=8192,
)


def test_a_head_that_weighs_eight_layers_counts_as_eight():
    assert weigh_head(SMOLLM2) == 8 * weigh_layer(SMOLLM2)
    assert deal_layers(SMOLLM2, 1) == (30,)
    assert deal_layers(SMOLLM2, 2) == (19, 11), "19 and 11 + 8"
    assert deal_layers(SMOLLM2, 3) == (13, 12, 5)
    assert deal_layers(SMOLLM2, 4) == (10, 9, 9, 2)


@pytest.mark.parametrize(
    ("layers", "stages", "dealt"),
    [(30, 2, (15, 15)), (30, 4, (8, 8, 7, 7)), (7, 3, (3, 2, 2)), (5, 2, (3, 2)), (3, 3, (1, 1, 1))],
)
def test_a_head_that_weighs_next_to_nothing_leaves_it_even(layers, stages, dealt):
    assert deal_layers(msgspec.structs.replace(SMOLLM2, vocab_size=1, num_layers=layers), stages) == dealt


@pytest.mark.parametrize(("layers", "stages", "vocab"), list(product((4, 7, 12), (2, 3), (1, 10_000, 49_152, 300_000))))
def test_no_other_way_is_better(layers, stages, vocab):
    config = msgspec.structs.replace(SMOLLM2, num_layers=layers, vocab_size=vocab)
    head = weigh_head(config) / weigh_layer(config)

    def slowest(counts):
        return max(*counts[:-1], counts[-1] + head)

    dealt = deal_layers(config, stages)
    assert sum(dealt) == layers and min(dealt) >= 1 and list(dealt[:-1]) == sorted(dealt[:-1], reverse=True)
    ways = [way for way in product(range(1, layers), repeat=stages) if sum(way) == layers]
    assert slowest(dealt) == min(map(slowest, ways))


def test_more_stages_than_layers_are_for_others_to_refuse():
    assert deal_layers(msgspec.structs.replace(SMOLLM2, num_layers=2), 3) == (1, 1, 1)


def test_layers_as_the_user_says():
    assert check_layers([16, 14], SMOLLM2, 2) == (16, 14)
    with pytest.raises(ConfigError, match=r"pipeline_layers has 1 entries for 2 stages \(pipeline_parallel\)"):
        check_layers([30], SMOLLM2, 2)
    with pytest.raises(ConfigError, match=r"= \[16, 16\] deals 32 layers, but the model has 30.*it is \[19, 11\]"):
        check_layers([16, 16], SMOLLM2, 2)
    with pytest.raises(ConfigError, match="each stage needs one"):
        check_layers([30, 0], SMOLLM2, 2)


def test_stages_hold_what_was_dealt():
    held = []
    for stage in range(3):
        parallel = Parallel()
        parallel.stage, parallel.num_stages, parallel.stage_layers = stage, 3, (13, 12, 5)
        held.append(parallel.layers_here(30))
    assert held == [range(13), range(13, 25), range(25, 30)]
