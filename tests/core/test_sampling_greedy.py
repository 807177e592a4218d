"""Steps whose requests need nothing but the argmax."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import BaseModel

from interlace.interfaces.logits_processor import LogitsProcessor
from interlace.messages import Admission, SamplingParams
from interlace.sampling.sampler import Sampler


class Nothing(LogitsProcessor):
    class Args(BaseModel):
        pass

    def add(self, slot, args, prompt):
        pass

    def remove(self, slot):
        pass

    def apply(self, logits, rows):
        pass


def admit(sampler, slot, **params):
    params = SamplingParams(**{"temperature": 0.0, **params})
    sampler.add(slot, Admission(slot, 0, [1, 2], 2, 0, params, 0, 0, tuple(params.stop_token_ids or ())))


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        ({}, True),
        ({"prompt_logprobs": 2}, True),  # made of the hidden states, apart
        ({"temperature": 0.7}, False),
        ({"logprobs": 0}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"repetition_penalty": 1.3}, False),
        ({"min_tokens": 3, "stop_token_ids": [4]}, False),
        ({"logits_processors": {"nothing": {}}}, False),
    ],
)
def test_one_request_that_needs_its_logits_is_enough(params, greedy):
    sampler = Sampler(10, {"nothing": Nothing(Nothing.Options(), 10)})
    assert sampler.is_greedy
    admit(sampler, 0)
    assert sampler.is_greedy
    admit(sampler, 1, **params)
    assert sampler.is_greedy is greedy
    sampler.remove(1)
    assert sampler.is_greedy


def test_choosing_is_sampling_and_fails_the_same_rows():
    import torch

    sampler = Sampler(10, {})
    for slot in range(4):
        admit(sampler, slot)
    logits = torch.randn(4, 10)
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    values, indices = logits.max(dim=1)
    chosen = sampler.choose((indices.numpy(), values.numpy()), [0, 1, 2, 3])
    assert chosen == sampler.sample(logits, [0, 1, 2, 3], [np.array([1, 2], dtype=np.int32)] * 4)
    assert chosen.token_ids[1:3] == [-1, -1] and sorted(chosen.errors) == [1, 2]


def test_a_refused_request_fails_its_row_only():
    sampler = Sampler(10, {})
    admit(sampler, 0)
    admit(sampler, 1, logit_bias={99: 1.0})
    assert sampler.is_greedy  # what is refused edits nothing
    chosen = sampler.choose((np.array([5, 6]), np.array([1.0, 2.0], dtype=np.float32)), [0, 1])
    assert chosen.token_ids == [5, -1]
    assert "99" in chosen.errors[1]
