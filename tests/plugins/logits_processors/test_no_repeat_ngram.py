"""`no_repeat_ngram` against transformers, alone and through the sampler."""

import importlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from interlace.interfaces.logits_processor import LogitsRow
from interlace.messages import Admission, SamplingParams
from interlace.plugins.logits_processors import interlace_logits_processors
from interlace.plugins.logits_processors.no_repeat_ngram import NoRepeatNGram
from interlace.sampling.sampler import Sampler

VOCAB = 12


@given(
    size=st.integers(1, 5),
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=15),
    output=st.lists(st.integers(0, 3), max_size=15),
)
@settings(max_examples=150, deadline=None)
def test_equals_transformers(size, prompt, output):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits.clone()
    expected[1:2] = NoRepeatNGramLogitsProcessor(size)(torch.tensor([prompt + output]), logits[1:2].clone())
    processor = NoRepeatNGram(NoRepeatNGram.Options(), VOCAB)
    processor.add(7, NoRepeatNGram.Args(size=size), prompt)
    processor.apply(logits, [LogitsRow(1, 7, np.array(output, dtype=np.int32))])
    assert torch.equal(logits, expected)


def test_greedy_generation_repeats_no_trigram():
    sampler = Sampler(VOCAB, {"no_repeat_ngram": NoRepeatNGram(NoRepeatNGram.Options(), VOCAB)})
    params = SamplingParams(temperature=0.0, logits_processors={"no_repeat_ngram": {"size": 3}})
    tokens = [0, 1, 2]
    sampler.add(0, Admission(0, 0, tokens, 3, 0, params, 0, 0, ()))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        result = sampler.sample(logits.clone(), [0], [np.array(tokens, dtype=np.int32)])
        assert result.errors == {}
        tokens = [*tokens, result.token_ids[0]]
    grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    assert len(grams) == len(set(grams))
    assert tokens.count(int(logits.argmax())) > 10  # the favourite, as often as it may


def test_tokens_beyond_the_vocabulary_of_the_logits_are_ignored():
    processor = NoRepeatNGram(NoRepeatNGram.Options(), VOCAB)
    processor.add(0, NoRepeatNGram.Args(size=1), [VOCAB + 3, 2])
    logits = torch.zeros(1, VOCAB)
    processor.apply(logits, [LogitsRow(0, 0, np.array([], dtype=np.int32))])
    assert torch.isinf(logits[0]).nonzero().flatten().tolist() == [2]


def test_is_listed_under_its_name():
    providers = {provider.name: provider for provider in interlace_logits_processors()}
    module, _, name = providers["no_repeat_ngram"].target.partition(":")
    assert getattr(importlib.import_module(module), name) is NoRepeatNGram
