"""Logit bias, allowed tokens, bad words, min_tokens and penalties, against transformers and a dense reference."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from interlace.messages import Admission, SamplingParams
from interlace.sampling.slots import SlotSampling, edit_logits

VOCAB = 40


def edited(params, tokens, num_prompt, logits, stops=()):
    """One row edited, between two that must stay as they are."""
    admission = Admission(0, 0, list(tokens[:num_prompt]), num_prompt, 0, params, 0, 0, tuple(stops))
    batch = torch.stack([logits, logits, logits])
    slot = SlotSampling.from_admission(admission, VOCAB)
    edit_logits(batch, [(1, slot)], {1: np.array(tokens, dtype=np.int32)})
    assert torch.equal(batch[0], logits)
    assert torch.equal(batch[2], logits)
    assert slot.edits or torch.equal(batch[1], logits)
    return batch[1]


def reference(params, tokens, num_prompt, logits, stops):
    """Token by token, in plain Python floats, in the documented order."""
    values = logits.tolist()
    for token, bias in (params.logit_bias or {}).items():
        values[token] += bias
    output = list(tokens[num_prompt:])
    counts = Counter(output)
    banned = set(range(VOCAB)) - set(params.allowed_token_ids) if params.allowed_token_ids is not None else set()
    for word in params.bad_words_token_ids:
        if list(tokens[len(tokens) - len(word) + 1 :]) == list(word[:-1]) and len(tokens) >= len(word) - 1:
            banned.add(word[-1])
    if len(output) < params.min_tokens:
        banned.update(stops)
    for token in range(VOCAB):
        if token in banned:
            values[token] = -math.inf
        if token in tokens:
            values[token] *= params.repetition_penalty if values[token] < 0 else 1 / params.repetition_penalty
        if token in counts:
            values[token] -= params.frequency_penalty * counts[token] + params.presence_penalty
    return torch.tensor(values)


tokens_strategy = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
penalty = st.sampled_from([0.0, 0.5, -1.25, 2.0])


@given(
    tokens=tokens_strategy,
    split=st.floats(0, 1),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=penalty,
    frequency=penalty,
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4),
    allowed=st.one_of(st.none(), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)),
    words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=5),
    min_tokens=st.integers(0, 8),
    stops=st.lists(st.integers(0, VOCAB + 10), max_size=3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_all_edits_together_equal_the_dense_reference(
    tokens, split, repetition, presence, frequency, bias, allowed, words, min_tokens, stops, seed
):
    params = SamplingParams(
        max_tokens=None,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        allowed_token_ids=allowed,
        bad_words_token_ids=words,
        min_tokens=min_tokens,
    )
    num_prompt = max(1, int(split * len(tokens)))
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    inside = [token for token in stops if token < VOCAB]
    expected = reference(params, tokens, num_prompt, logits, inside)
    torch.testing.assert_close(edited(params, tokens, num_prompt, logits, stops), expected)


@pytest.mark.parametrize("value", [1.3, 0.6])
def test_repetition_penalty_equals_transformers(value):
    tokens = [3, 9, 9, 31, 4, 3]
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    expected = RepetitionPenaltyLogitsProcessor(value)(torch.tensor([tokens]), logits[None].clone())[0]
    torch.testing.assert_close(edited(SamplingParams(repetition_penalty=value), tokens, 3, logits), expected)


def test_bad_words_equal_transformers():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    words = [[5], [7, 8], [1, 2, 3], [4, 2, 9], [2, 11], [30, 2, 30]]
    for tokens in ([1, 2], [4, 2], [7, 7, 7], [0, 30, 2], [5, 1, 2, 6]):
        ids = [3, 3, 3, *tokens]
        expected = NoBadWordsLogitsProcessor(words)(torch.tensor([ids]), logits[None].clone())[0]
        assert torch.equal(edited(SamplingParams(bad_words_token_ids=words), ids, 4, logits), expected)


def test_min_tokens_equals_transformers():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    for generated in range(5):
        ids = [1, 2, 3] + [9] * generated
        processor = MinNewTokensLengthLogitsProcessor(3, 3, [6, 7], device="cpu")
        expected = processor(torch.tensor([ids]), logits[None].clone())[0]
        result = edited(SamplingParams(min_tokens=3), ids, 3, logits, stops=(6, 7))
        assert torch.equal(result, expected)
        assert bool(result[6] == -math.inf) == (generated < 3)


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros(VOCAB)
    result = edited(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [1, 1, 2, 2, 2, 3], 3, logits)
    assert result[[1, 2, 3, 4]].tolist() == [0.0, -1.0, -0.75, 0.0]


def test_repetition_counts_the_prompt_once_and_skips_tokens_the_model_cannot_produce():
    logits = torch.ones(VOCAB)
    params = SamplingParams(repetition_penalty=2.0)
    admission = Admission(0, 0, [1, 1, VOCAB + 5], 3, 0, params, 0, 0, ())
    batch = logits[None].clone()
    slot = SlotSampling.from_admission(admission, VOCAB)
    edit_logits(batch, [(0, slot)], [np.array([1, 1, VOCAB + 5, 1, 2], dtype=np.int32)])
    assert batch[0, :4].tolist() == [1.0, 0.5, 0.5, 1.0]


def test_penalties_follow_rejected_drafts():
    """Rows state their own tokens, so several positions of one slot, or a rewind, need no bookkeeping."""
    params = SamplingParams(presence_penalty=1.0)
    slot = SlotSampling.from_admission(Admission(0, 0, [1], 1, 0, params, 0, 0, ()), VOCAB)
    batch = torch.zeros(3, VOCAB)
    histories = [np.array(tokens, dtype=np.int32) for tokens in ([1, 2], [1, 2, 3], [1, 4])]
    edit_logits(batch, [(0, slot), (1, slot), (2, slot)], histories)
    assert [torch.nonzero(row).flatten().tolist() for row in batch] == [[2], [2, 3], [4]]
