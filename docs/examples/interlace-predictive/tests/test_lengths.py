"""What is learned from finished requests, and what is not."""

from __future__ import annotations

from interlace.messages import EngineRequest, SamplingParams
from interlace.request import RequestState
from pytest import MonkeyPatch, approx

from interlace_predictive import lengths
from interlace_predictive.lengths import OutputLengths


def make_request(num_output: int = 0, *, prompt: int = 8, task: str = "", **params: object) -> RequestState:
    """A request that has generated `num_output` tokens of at most 100."""
    labels = {"task": task} if task else {}
    request = EngineRequest(
        id="r",
        prompt_token_ids=[1] * prompt,
        params=SamplingParams.from_dict({"max_tokens": 100, **params}),
        arrival_time=0.0,
        seed=0,
        labels=labels,
    )
    state = RequestState(request, 512, 1)
    state.num_known += num_output
    return state


def learned(*finished: RequestState, memory: int = 500) -> OutputLengths:
    lengths = OutputLengths(prior=40.0, memory=memory, label="task")
    for request in finished:
        lengths.learn(request)
    return lengths


def test_knows_nothing_at_first():
    assert learned().predict(make_request()) == 40.0
    assert learned().predict(make_request(max_tokens=10)) == 10.0
    assert learned().predict(make_request(min_tokens=60)) == 60.0


def test_approaches_what_it_sees():
    few = learned(*[make_request(10)] * 2).predict(make_request())
    many = learned(*[make_request(10)] * 50).predict(make_request())
    assert 10 < many < few < 40
    assert many == approx(10, abs=0.5)


def test_tells_prompt_lengths_and_labels_apart():
    short = [make_request(2, task="classify"), make_request(6, prompt=100)]
    long = [make_request(80, task="write")]
    lengths = learned(*(short + long) * 60)
    assert lengths.predict(make_request(task="classify")) == approx(2, abs=5)
    assert lengths.predict(make_request(task="write")) == approx(80, abs=6)
    assert lengths.predict(make_request(prompt=100)) == approx(6, abs=2)


def test_a_new_kind_borrows_from_the_wider_group():
    lengths = learned(*[make_request(10, task="old")] * 50)
    assert lengths.predict(make_request(task="new")) == approx(10, abs=1)


def test_follows_a_change():
    lengths = learned(*[make_request(10)] * 200, *[make_request(50)] * 60, memory=20)
    assert lengths.predict(make_request()) == approx(50, abs=4)


def test_a_fixed_length_is_known_and_teaches_nothing():
    fixed = {"ignore_eos": True, "max_tokens": 90}
    lengths = learned(*[make_request(90, **fixed)] * 50)
    assert lengths.predict(make_request(**fixed)) == 90.0
    assert lengths.predict(make_request()) == 40.0


def test_a_request_that_never_ran_teaches_nothing():
    assert learned(*[make_request(0)] * 50).predict(make_request()) == 40.0


def test_memory_is_bounded_whatever_the_labels(monkeypatch: MonkeyPatch):
    monkeypatch.setattr(lengths, "MAX_GROUPS", 8)
    known = learned(*(make_request(10, task=str(number)) for number in range(100)))
    assert known.predict(make_request(task="99")) < 20
    assert len(known._means) == 8
