"""The sampler as a whole: mixed batches, seeds, masks, log probabilities, custom processors, failures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from interlace.interfaces.logits_processor import LogitsProcessor
from interlace.messages import Admission, SamplingParams
from interlace.sampling import sampler as sampler_module
from interlace.sampling.distribution import Shape, final_probabilities
from interlace.sampling.sampler import Sampler

VOCAB = 1000


def admission(params, slot=0, tokens=(1, 2, 3), num_prompt=None, seed=0, sample_index=0, stops=()):
    num_prompt = len(tokens) if num_prompt is None else num_prompt
    return Admission(slot, 0, list(tokens), num_prompt, 0, params, seed, sample_index, tuple(stops))


def array(*tokens):
    return np.array(tokens, dtype=np.int32)


def logits_of(rows, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sample_one(logits, params, tokens=(1, 2, 3), num_prompt=None, processors=None, **keys):
    sampler = Sampler(logits.shape[1], processors or {})
    sampler.add(0, admission(params, tokens=tokens, num_prompt=num_prompt, **keys))
    return sampler.sample(logits.clone(), [0], [array(*tokens)])


class NoHistories:
    def __getitem__(self, row):
        raise AssertionError("a greedy batch looked at the tokens of a row")


class Add(LogitsProcessor):
    """Adds a number to one token's logit; the tokens 997 to 999 as argument break one method each."""

    class Args(BaseModel):
        model_config = ConfigDict(extra="forbid")
        token: int
        amount: float = 100.0

    def __init__(self, options=None, vocab_size=VOCAB):
        super().__init__(options, vocab_size)
        self.args = {}
        self.seen = []

    def add(self, slot, args, prompt_token_ids):
        if args.token == 998:
            raise ValueError("cannot take 998")
        self.args[slot] = args
        self.prompt = list(prompt_token_ids)

    def remove(self, slot):
        if self.args.pop(slot).token == 997:
            raise OSError("stuck")

    def apply(self, logits, rows):
        self.seen.append([(row, slot, output.tolist()) for row, slot, output in rows])
        for row, slot, _ in rows:
            if self.args[slot].token == 999:
                raise RuntimeError("broke")
            logits[row, self.args[slot].token] += self.args[slot].amount


def forbid_everything_but_argmax(monkeypatch):
    for name in ("edit_logits", "select_logprobs", "uniform", "take_rows", "LogitsRow"):
        monkeypatch.setattr(sampler_module, name, None)


def test_greedy_takes_the_first_of_the_most_likely_and_does_nothing_else(monkeypatch):
    forbid_everything_but_argmax(monkeypatch)
    logits = logits_of(5)
    logits[2, 40] = logits[2, 17] = 99.0
    sampler = Sampler(VOCAB, {"add": Add()})
    for slot in range(5):
        sampler.add(slot, admission(SamplingParams(temperature=0.0)))
    before = logits.clone()
    result = sampler.sample(logits, [4, 3, 2, 1, 0], NoHistories())
    assert result.token_ids == before.argmax(dim=1).tolist()
    assert result.token_ids[2] == 17
    assert (result.logprobs, result.errors) == ({}, {})
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "edit", [{}, {"logit_bias": {7: 100.0}}, {"logits_processors": {"add": {"token": 7, "amount": 99}}}]
)
def test_a_known_argmax_counts_while_the_logits_are_unchanged(edit):
    logits = logits_of(1)
    known = np.array([13]), np.array([1.0], dtype=np.float32)  # on purpose not theirs, to tell who looked
    sampler = Sampler(VOCAB, {"add": Add()})
    sampler.add(0, admission(SamplingParams(temperature=0.0, **edit)))
    assert sampler.sample(logits, [0], [array(1, 2, 3)], known).token_ids == [7 if edit else 13]


def test_a_feature_is_forgotten_with_the_last_request_that_used_it(monkeypatch):
    sampler = Sampler(VOCAB, {"add": Add()})
    params = SamplingParams(
        presence_penalty=1.0, logprobs=1, temperature=1.0, logits_processors={"add": {"token": 5, "amount": 1}}
    )
    sampler.add(0, admission(params))
    sampler.sample(logits_of(1), [0], [array(1, 2, 3)])
    forbid_everything_but_argmax(monkeypatch)
    sampler.remove(0)
    sampler.add(0, admission(SamplingParams(temperature=0.0)))
    assert sampler.sample(logits_of(1), [0], NoHistories()).logprobs == {}
    sampler.remove(0)
    sampler.remove(0)  # an empty slot is no error


def test_sampled_token_is_drawn_by_the_documented_number():
    """Slot, row and preemption do not enter; seed, sample index and output position do."""
    logits = logits_of(1, vocab=50, scale=1.0)
    params = SamplingParams(temperature=0.9, top_p=0.95)
    cdf = final_probabilities(logits, [Shape(0.9, 0, 0.95, 0.0)])[0].cumsum(0)
    for seed, index, outputs in [(0, 0, 0), (7, 0, 0), (7, 1, 0), (7, 1, 4), (-5, 0, 2)]:
        tokens = (1, 2, 3) + (9,) * outputs
        number = sampler_module.uniform([seed], [index], [outputs])[0]
        expected = int(torch.searchsorted(cdf, torch.tensor([number]).double(), right=True))
        result = sample_one(logits, params, tokens, 3, seed=seed, sample_index=index)
        assert result.token_ids == [expected]


def mixed_params(index):
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "presence_penalty": 1.5},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 1 + index},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 300, "top_p": 0.8, "repetition_penalty": 1.2},
        {"temperature": 1.0, "top_p": 0.99, "frequency_penalty": 0.7},
        {"temperature": 1.0, "logit_bias": {5: 3.0}, "logprobs": 4},
        {"temperature": 1.0, "allowed_token_ids": [1, 5, 9, 700]},
        {"temperature": 0.0, "bad_words_token_ids": ((3, 4), (8,)), "logprobs": 0},
        {"temperature": 1.0, "min_tokens": 50, "max_tokens": None},
        {"temperature": 1.0, "logits_processors": {"add": {"token": index, "amount": 4.0}}},
    ]
    return SamplingParams(**kinds[index % len(kinds)])


@pytest.mark.parametrize("vocab", [VOCAB, 8192])
def test_alone_and_among_31_others_give_the_same_bits(vocab):
    logits = logits_of(32, vocab, seed=vocab, scale=2.0)
    history = np.random.default_rng(0).integers(0, vocab, (32, 40)).astype(np.int32)
    everyone = [admission(mixed_params(i), tokens=history[i, :20], seed=i * 31, stops=(2, 3)) for i in range(32)]
    together = Sampler(vocab, {"add": Add()})
    slots = [int(slot) for slot in np.random.default_rng(1).permutation(32)]
    for slot, one in zip(slots, everyone, strict=True):
        together.add(slot, one)
    result = together.sample(logits.clone(), slots, history)
    assert result.errors == {}
    for i, one in enumerate(everyone):
        alone = Sampler(vocab, {"add": Add()})
        alone.add(77, one)
        single = alone.sample(logits[i : i + 1].clone(), [77], history[i : i + 1])
        assert single.token_ids[0] == result.token_ids[i]
        assert single.logprobs.get(0) == result.logprobs.get(i)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_selection_of_rows_gives_each_row_the_same_token(data):
    logits = logits_of(13, 400, seed=data.draw(st.integers(0, 1000)))
    history = np.random.default_rng(0).integers(0, 400, (13, 9)).astype(np.int32)
    sampler = Sampler(400, {"add": Add(vocab_size=400)})
    for i in range(13):
        params = SamplingParams(temperature=1.0, allowed_token_ids=[1, 7]) if i == 9 else mixed_params(i)
        sampler.add(i, admission(params, tokens=history[i, :4], seed=i))
    everything = sampler.sample(logits.clone(), range(13), history).token_ids
    chosen = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=13, unique=True))
    some = sampler.sample(logits[chosen].clone(), chosen, history[chosen]).token_ids
    assert some == [everything[i] for i in chosen]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.8), SamplingParams(top_p=0.9, top_k=30)], ids=str)
def test_frequencies_of_sampled_tokens(params):
    """Chi-square over 8,000 output positions of one request, within 4 standard deviations."""
    count, vocab = 8000, 60
    logits = logits_of(1, vocab, scale=1.5)
    shape = Shape(params.temperature, params.top_k, params.top_p, params.min_p)
    expected = final_probabilities(logits, [shape])[0].numpy() * count
    sampler = Sampler(vocab, {})
    sampler.add(0, admission(params, tokens=(1,), seed=123))
    tokens = []
    known = np.zeros(count + 1, dtype=np.int32)
    for start in range(0, count, 500):
        histories = [known[: 1 + start + i] for i in range(500)]
        tokens += sampler.sample(logits.repeat(500, 1), [0] * 500, histories).token_ids
    observed = np.bincount(tokens, minlength=vocab)
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    statistic = ((observed[common] - expected[common]) ** 2 / expected[common]).sum()
    degrees = int(common.sum()) - 1
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


def test_siblings_and_seeds_differ():
    logits = logits_of(1, scale=0.1)
    params = SamplingParams(temperature=1.0)
    found = {
        sample_one(logits, params, seed=seed, sample_index=index).token_ids[0]
        for seed in range(8)
        for index in range(8)
    }
    assert len(found) > 50


# ── errors of one row ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_invalid_numbers_fail_their_row_only(temperature, poison):
    logits = logits_of(3)
    sampler = Sampler(VOCAB, {})
    for slot in range(3):
        sampler.add(slot, admission(SamplingParams(temperature=temperature, logprobs=1), seed=slot))
    history = [array(1, 2, 3)] * 3
    expected = sampler.sample(logits.clone(), [0, 1, 2], history)
    logits[1, 500] = poison
    result = sampler.sample(logits, [0, 1, 2], history)
    assert list(result.errors) == [1]
    assert "NaN" in result.errors[1]
    assert result.token_ids == [expected.token_ids[0], -1, expected.token_ids[2]]
    assert result.logprobs == {row: expected.logprobs[row] for row in (0, 2)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_choose_fails_its_row_only(temperature):
    logits = logits_of(2)
    sampler = Sampler(VOCAB, {})
    sampler.add(0, admission(SamplingParams(temperature=0.0)))
    params = SamplingParams(temperature=temperature, allowed_token_ids=[4, 5], bad_words_token_ids=((4,), (5,)))
    sampler.add(1, admission(params))
    result = sampler.sample(logits.clone(), [0, 1], [array(1, 2, 3)] * 2)
    assert result.token_ids == [int(logits[0].argmax()), -1]
    assert list(result.errors) == [1]
    assert "no token is left" in result.errors[1]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"allowed_token_ids": [3, VOCAB]}, "allowed_token_ids contains token id 1000"),
        ({"logit_bias": {VOCAB + 4: 1.0}}, "logit_bias contains token id 1004"),
        ({"bad_words_token_ids": ((1, 2000),)}, "bad_words_token_ids contains token id 2000"),
        ({"logits_processors": {"ad": {}}}, "'ad' is not enabled"),
        ({"logits_processors": {"add": {"tokn": 3}}}, "logits_processors['add']"),
        ({"logits_processors": {"add": {"token": 998}}}, "cannot take 998"),
    ],
)
def test_a_request_that_slipped_past_the_front_fails_alone(values, text, caplog):
    logits = logits_of(2)
    sampler = Sampler(VOCAB, {"add": Add()})
    sampler.add(0, admission(SamplingParams(**values)))
    sampler.add(1, admission(SamplingParams(temperature=0.0)))
    result = sampler.sample(logits.clone(), [0, 1], [array(1, 2, 3)] * 2)
    assert result.token_ids == [-1, int(logits[1].argmax())]
    assert text in result.errors[0]
    assert list(result.errors) == [0]
    sampler.remove(0)  # a processor is not asked to remove what it never took
    assert "failed in remove" not in caplog.text


# ── custom processors ───────────────────────────────────────────────────────────────────────────────────────────


def test_processor_changes_only_the_rows_that_name_it():
    logits = logits_of(3)
    processor = Add()
    sampler = Sampler(VOCAB, {"add": processor})
    plain = SamplingParams(temperature=0.0)
    sampler.add(3, admission(plain))
    sampler.add(4, admission(SamplingParams(temperature=0.0, logits_processors={"add": {"token": 11}})))
    result = sampler.sample(logits.clone(), [3, 4, 3], [array(1, 2, 3), array(1, 2, 3, 8, 9), array(1, 2, 3)])
    best = logits.argmax(dim=1).tolist()
    assert result.token_ids == [best[0], 11, best[2]]
    assert processor.seen == [[(1, 4, [8, 9])]]
    assert processor.prompt == [1, 2, 3]
    sampler.remove(4)
    assert processor.args == {}


def test_processor_that_raises_fails_its_own_requests_and_is_logged(caplog):
    logits = logits_of(3)
    sampler = Sampler(VOCAB, {"add": Add(), "other": Add()})
    sampler.add(0, admission(SamplingParams(temperature=0.0, logits_processors={"add": {"token": 999}})))
    sampler.add(1, admission(SamplingParams(temperature=0.0, logits_processors={"other": {"token": 12}})))
    sampler.add(2, admission(SamplingParams(temperature=0.0)))
    result = sampler.sample(logits.clone(), [0, 1, 2], [array(1, 2, 3)] * 3)
    assert result.errors == {0: "logits processor 'add' failed in apply: RuntimeError: broke"}
    assert result.token_ids == [-1, 12, int(logits[2].argmax())]
    assert "RuntimeError: broke" in caplog.text
    sampler.remove(0)
    sampler.add(0, admission(SamplingParams(temperature=0.0)))
    assert sampler.sample(logits.clone(), [0], NoHistories()).errors == {}


def test_processor_that_raises_in_remove_is_logged_and_the_slot_is_free(caplog):
    sampler = Sampler(VOCAB, {"add": Add()})
    sampler.add(0, admission(SamplingParams(logits_processors={"add": {"token": 997}})))
    sampler.remove(0)
    assert "failed in remove: OSError: stuck" in caplog.text
    sampler.add(0, admission(SamplingParams(temperature=0.0)))
    assert sampler.sample(logits_of(1), [0], NoHistories()).errors == {}


def test_processor_cannot_change_the_tokens_it_looks_at():
    class Vandal(Add):
        def apply(self, logits, rows):
            rows[0].output_token_ids[0] = 7

    tokens = array(1, 2, 3, 8)
    sampler = Sampler(VOCAB, {"add": Vandal()})
    sampler.add(0, admission(SamplingParams(logits_processors={"add": {"token": 1}})))
    result = sampler.sample(logits_of(1), [0], [tokens])
    assert "read-only" in result.errors[0]
    assert tokens.tolist() == [1, 2, 3, 8]


# ── log probabilities ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vocab", [VOCAB, 8192])
def test_logprobs_are_of_the_raw_distribution(vocab):
    """Whatever changes the logits afterwards."""
    logits = logits_of(1, vocab)
    raw = torch.log_softmax(logits.double(), dim=1)[0]
    params = SamplingParams(temperature=0.3, logprobs=5, allowed_token_ids=[7], logit_bias={7: 50.0})
    result = sample_one(logits, params)
    assert result.token_ids == [7]
    entry = result.logprobs[0]
    best = raw.topk(5)
    assert entry.token_ids == [7, *best.indices.tolist()]
    assert entry.logprobs == pytest.approx([float(raw[7]), *best.values.tolist()], abs=1e-5)
    assert entry.rank == int((raw > raw[7]).sum()) + 1


def test_logprobs_of_several_rows_with_different_counts():
    logits = logits_of(3)
    sampler = Sampler(VOCAB, {})
    for slot, count in enumerate((0, None, 20)):
        sampler.add(slot, admission(SamplingParams(temperature=0.0, logprobs=count)))
    result = sampler.sample(logits.clone(), [0, 1, 2], NoHistories())
    assert {row: len(entry.token_ids) for row, entry in result.logprobs.items()} == {0: 1, 2: 21}
    assert [entry.rank for entry in result.logprobs.values()] == [1, 1]
    assert result.logprobs[2].token_ids[:2] == [result.token_ids[2]] * 2


def test_prompt_logprobs():
    logits = logits_of(150)
    next_ids = np.random.default_rng(0).integers(0, VOCAB, 150)
    sampler = Sampler(VOCAB, {})
    sampler.add(0, admission(SamplingParams(prompt_logprobs=2)))
    entries = sampler.prompt_logprobs(0, logits, next_ids)
    raw = torch.log_softmax(logits.double(), dim=1)
    assert len(entries) == 150
    for position, entry in enumerate(entries):
        token = int(next_ids[position])
        assert entry.token_ids == [token, *raw[position].topk(2).indices.tolist()]
        assert entry.logprobs[0] == pytest.approx(float(raw[position, token]), abs=1e-5)
        assert entry.rank == int((raw[position] > raw[position, token]).sum()) + 1
