"""From step outputs to what users see."""

import pytest

from interlace import SamplingParams
from interlace.clock import VirtualClock
from interlace.engine.detokenizer import _ByteLevelStream
from interlace.engine.input_processor import InputProcessor
from interlace.engine.output_processor import OutputProcessor
from interlace.errors import EngineDeadError, InvalidRequestError
from interlace.messages import FinishInfo, StepOutput, TokenLogprobs
from interlace.testing.front import byte_tokenizer, front_spec

TOKENIZER = byte_tokenizer()
BYTE_IDS = {0xC3: TOKENIZER.encode("\u00e9")[0], 0xA9: TOKENIZER.encode("\u00e9")[1]}
BYTE_IDS |= {0xE2: TOKENIZER.encode("\u20ac")[0], 0x82: TOKENIZER.encode("\u20ac")[1]}
STOP, LENGTH = FinishInfo(reason="stop"), FinishInfo(reason="length")


class Recorder:
    """A sink that remembers what it was told."""

    def __init__(self):
        self.calls = []

    def deliver(self, requests):
        self.calls.append([request.id for request in requests])


class Bench:
    """An output processor and the steps a test makes up."""

    def __init__(self):
        self.outputs = OutputProcessor(TOKENIZER)
        self.inputs = InputProcessor(front_spec(TOKENIZER.vocab_size), TOKENIZER, VirtualClock(1.0))
        self.sink = Recorder()
        self.now = 1.0

    def add(self, request_id="r", streaming=True, prompt="hello", **params):
        params.setdefault("max_tokens", 50)
        prepared = self.inputs.prepare(prompt, SamplingParams(**params), request_id=request_id)
        return self.outputs.add(prepared, self.sink, streaming)

    def step(self, tokens, **fields):
        """`tokens`: engine id → text or ids."""
        self.now += 1.0
        ids = {name: TOKENIZER.encode(value) if isinstance(value, str) else value for name, value in tokens.items()}
        done = self.outputs.process(
            StepOutput(
                step_id=int(self.now),
                now=self.now,
                request_ids=list(ids),
                counts=[len(value) for value in ids.values()],
                token_ids=[token for value in ids.values() for token in value],
                **fields,
            )
        )
        for sink, requests in done.news.items():
            sink.deliver(requests)
        return done

    def text(self, request):
        return self.outputs.whole(request).outputs[0].text


@pytest.fixture
def bench():
    return Bench()


def test_a_request_from_first_token_to_last(bench):
    request = bench.add()
    bench.step({}, first_scheduled={"r": 1.5}, cached_tokens={"r": 4})
    bench.step({"r": "ab"})
    done = bench.step({"r": "c"}, finished={"r": LENGTH})
    output = bench.outputs.whole(request)
    assert output.finished and (output.prompt, output.prompt_token_ids) == ("hello", TOKENIZER.encode("hello"))
    [answer] = output.outputs
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("abc", "length", None)
    assert answer.token_ids == TOKENIZER.encode("abc")
    assert (output.usage.prompt_tokens, output.usage.completion_tokens, output.usage.cached_tokens) == (5, 3, 4)
    metrics = output.metrics
    assert (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time) == (1.0, 1.5, 3.0)
    assert (metrics.last_token_time, metrics.finished_time, metrics.ttft, metrics.e2e_latency) == (4.0, 4.0, 2.0, 3.0)
    [summary] = done.summaries
    assert (summary.request_id, summary.finish_reason, summary.num_output_tokens) == ("r", "length", 3)
    assert bench.outputs.num_active == 0


def test_deltas_merge_when_they_are_not_taken(bench):
    request = bench.add(logprobs=0)
    lp = [TokenLogprobs([1], [-0.25], 1)]
    bench.step({"r": "a"}, logprobs={"r": lp})
    assert bench.outputs.take(request).outputs[0].text == "a"
    assert bench.outputs.take(request) is None
    bench.step({"r": "b"}, logprobs={"r": lp})
    bench.step({"r": "c"}, logprobs={"r": lp}, finished={"r": LENGTH})
    delta = bench.outputs.take(request)
    assert (delta.outputs[0].text, delta.outputs[0].token_ids) == ("bc", TOKENIZER.encode("bc"))
    assert len(delta.outputs[0].logprobs) == 2 and delta.outputs[0].cumulative_logprob == -0.75
    assert delta.finished and delta.usage.completion_tokens == 3
    assert bench.outputs.take(request) is None


def test_only_streaming_sinks_hear_of_every_step(bench):
    bench.add("s", streaming=True)
    bench.add("w", streaming=False)
    bench.step({"s": "a", "w": "a"})
    bench.step({"s": "b", "w": "b"}, finished={"s": LENGTH, "w": LENGTH})
    assert bench.sink.calls == [["s"], ["s", "w"]]


def test_the_token_that_ends_a_request_is_kept_but_not_written(bench):
    eos = bench.add("eos", skip_special_tokens=False)
    x = TOKENIZER.encode("x")[0]
    by_id = bench.add("id", stop_token_ids=[x])
    included = bench.add("in", stop_token_ids=[x], include_stop_str_in_output=True)
    ends = {"eos": STOP, "id": FinishInfo(reason="stop", stop_reason=x), "in": FinishInfo(reason="stop", stop_reason=x)}
    bench.step({"eos": [*TOKENIZER.encode("a"), 256], "id": "ax", "in": "ax"}, finished=ends)
    assert [bench.text(request) for request in (eos, by_id, included)] == ["a", "a", "ax"]
    assert bench.outputs.whole(eos).outputs[0].token_ids[-1] == 256
    assert bench.outputs.whole(by_id).outputs[0].token_ids[-1] == x
    assert bench.outputs.whole(by_id).outputs[0].stop_reason == x


def test_a_stop_string_ends_the_request_here_and_asks_the_engine_to(bench):
    request = bench.add(stop=["END"])
    assert bench.step({"r": "a E"}).aborts == []
    assert bench.outputs.take(request).outputs[0].text == "a "
    done = bench.step({"r": "NDxy"})
    assert done.aborts == ["r"] and done.summaries == []
    delta = bench.outputs.take(request)
    assert delta.finished and (delta.outputs[0].text, delta.outputs[0].stop_reason) == ("", "END")
    # Tokens behind the one that completed the stop string are dropped; so is what was already under way.
    assert bench.text(request) == "a " and bench.outputs.whole(request).outputs[0].token_ids == TOKENIZER.encode(
        "a END"
    )
    assert bench.step({"r": "late"}).news == {}
    done = bench.step({}, finished={"r": FinishInfo(reason="abort", num_preemptions=2)})
    assert bench.outputs.whole(request).outputs[0].finish_reason == "stop"
    assert (done.summaries[0].finish_reason, done.summaries[0].num_preemptions) == ("stop", 2)
    assert bench.outputs.num_active == 0
    assert bench.sink.calls == [["r"], ["r"]]


def test_a_stop_string_completed_by_the_last_token_needs_no_abort(bench):
    request = bench.add(stop=["b"])
    assert bench.step({"r": "ab"}, finished={"r": LENGTH}).aborts == []
    answer = bench.outputs.whole(request).outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("a", "stop", "b")


def test_text_held_back_comes_with_the_end(bench):
    request = bench.add(stop=["xyz"])
    bench.step({"r": "axy"})
    assert bench.text(request) == "a"
    bench.step({}, finished={"r": LENGTH})
    assert bench.text(request) == "axy"


def test_no_stop_string_counts_before_min_tokens(bench):
    request = bench.add(stop=["a"], min_tokens=3)
    bench.step({"r": "aab"})
    assert bench.outputs.whole(request).outputs[0].finish_reason is None
    assert bench.step({"r": "ba"}).aborts == ["r"]
    assert bench.text(request) == "aabb"


def test_detokenize_off_gives_ids_only(bench):
    request = bench.add(detokenize=False)
    bench.step({"r": "abc"}, finished={"r": LENGTH})
    assert (bench.text(request), len(bench.outputs.whole(request).outputs[0].token_ids)) == ("", 3)


def test_half_a_character_waits(bench):
    request = bench.add()
    first, second = TOKENIZER.encode("é")
    bench.step({"r": [first]})
    assert bench.outputs.take(request).outputs[0].text == ""
    bench.step({"r": [second]})
    assert bench.outputs.take(request).outputs[0].text == "é"


def test_logprobs(bench):
    request = bench.add(logprobs=2, prompt_logprobs=1)
    a, b, c = TOKENIZER.encode("abc")
    entry = TokenLogprobs([c, a, b], [-3.0, -0.5, -1.0], 7)
    likely = TokenLogprobs([a, a, b], [-0.5, -0.5, -1.0], 1)
    prompt = [TokenLogprobs([token, a], [-1.0, -0.1], 2) for token in TOKENIZER.encode("ello")]
    bench.step({}, prompt_logprobs={"r": prompt[:3]})
    bench.step({"r": [c, a]}, logprobs={"r": [entry, likely]}, prompt_logprobs={"r": prompt[3:]})
    output = bench.outputs.whole(request)
    first, second = output.outputs[0].logprobs
    assert list(first) == [c, a, b] and [x.rank for x in first.values()] == [7, 1, 2]
    assert [x.decoded_token for x in first.values()] == ["c", "a", "b"]
    assert list(second) == [a, b] and second[a].rank == 1
    assert output.outputs[0].cumulative_logprob == -3.5
    assert len(output.prompt_logprobs) == 5 and output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1][TOKENIZER.encode("e")[0]].rank == 2
    # A prompt computed again after preemption adds nothing, and a delta has them once.
    bench.step({}, prompt_logprobs={"r": prompt})
    assert len(bench.outputs.take(request).prompt_logprobs) == 5
    bench.step({"r": [a]}, logprobs={"r": [likely]})
    assert bench.outputs.take(request).prompt_logprobs is None


def test_n_samples_finish_one_by_one(bench):
    request = bench.add(n=2, stop=["."])
    bench.step({"r-0": "a", "r-1": "b"}, cached_tokens={"r-0": 0, "r-1": 4})
    assert [o.index for o in bench.outputs.take(request).outputs] == [0, 1]
    assert bench.step({"r-0": ".", "r-1": "c"}).aborts == ["r-0"]
    delta = bench.outputs.take(request)
    assert not delta.finished and [o.finish_reason for o in delta.outputs] == ["stop", None]
    bench.step({"r-1": "d"}, finished={"r-0": FinishInfo(reason="abort")})
    assert [o.index for o in bench.outputs.take(request).outputs] == [1]
    done = bench.step({"r-1": "e"}, finished={"r-1": LENGTH})
    whole = bench.outputs.whole(request)
    assert [o.text for o in whole.outputs] == ["a", "bcde"] and whole.finished
    assert whole.usage.completion_tokens == 6 and whole.usage.cached_tokens == 0
    assert [s.finish_reason for s in done.summaries] == ["length"]


def test_one_failure_leaves_the_others_alone(bench):
    bad, good = bench.add("bad"), bench.add("good")
    info = FinishInfo(reason="error", error="no room", error_code="kv_capacity")
    bench.step({"good": "a"}, finished={"bad": info})
    output = bench.outputs.whole(bad)
    assert (output.outputs[0].finish_reason, output.error) == ("error", "no room")
    assert bad.samples[0].error_code == "kv_capacity"
    bench.step({"good": "b"}, finished={"good": LENGTH})
    assert bench.text(good) == "ab" and bench.outputs.whole(good).error is None


def test_abort_keeps_what_there_is(bench):
    request = bench.add(stop=["xyz"])
    bench.step({"r": "ax"})
    assert bench.outputs.abort(request, 9.0) == ["r"]
    output = bench.outputs.whole(request)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ax", "abort")
    assert output.finished and output.metrics.finished_time == 9.0
    assert bench.step({"r": "y"}).news == {}
    assert bench.step({}, finished={"r": FinishInfo(reason="abort")}).summaries[0].finish_reason == "abort"


def test_ids_are_unique_until_the_engine_lets_go(bench):
    request = bench.add(stop=["b"])
    bench.step({"r": "ab"})
    assert request.finished
    with pytest.raises(InvalidRequestError, match="request id 'r' is in use"):
        bench.add()
    bench.step({}, finished={"r": FinishInfo(reason="abort")})
    bench.add()


def test_unknown_requests_in_a_step_are_ignored(bench):
    request = bench.add()
    bench.step({"ghost": "abc", "r": "d"}, finished={"other": STOP}, cached_tokens={"ghost": 1})
    assert bench.text(request) == "d"


def test_death_reaches_every_request_with_the_cause(bench):
    running, done = bench.add("running"), bench.add("done")
    bench.step({"running": "a", "done": "a"}, finished={"done": LENGTH})
    error = EngineDeadError("it stopped")
    error.__cause__ = MemoryError("too big")
    failed = bench.outputs.fail(error, 7.0)
    assert failed.news == {bench.sink: [running]}
    [summary] = failed.summaries
    assert (summary.finish_reason, summary.error_code, summary.metrics.finished_time) == ("error", "engine_dead", 7.0)
    for attempt in (bench.outputs.take, bench.outputs.whole):
        with pytest.raises(EngineDeadError, match="it stopped") as caught:
            attempt(running)
        assert caught.value is not error and isinstance(caught.value.__cause__, MemoryError)
    assert bench.text(done) == "a"
    with pytest.raises(EngineDeadError):
        bench.add("later")


class CountedLookups(dict):
    """Remembers which keys were asked for, and that nobody walked over all of them."""

    def __init__(self, entries):
        super().__init__(entries)
        self.asked = []

    def get(self, key, default=None):
        self.asked.append(key)
        return super().get(key, default)

    def __iter__(self):
        raise AssertionError("a step must not walk over all requests")

    items = values = keys = __iter__


@pytest.mark.parametrize("streaming", [True, False])
def test_work_of_a_step_is_for_requests_with_news_only(bench, streaming):
    for i in range(50):
        bench.add(f"idle-{i}")
    bench.add("busy", streaming=streaming)
    samples = bench.outputs._samples = CountedLookups(bench.outputs._samples)
    bench.outputs._requests = CountedLookups(bench.outputs._requests)
    done = bench.step({"busy": "a"})
    assert samples.asked == ["busy"]
    assert [request.id for requests in done.news.values() for request in requests] == ["busy"] * streaming


def test_the_engine_side_makes_no_text_unless_a_stop_string_may_end_it(bench, monkeypatch):
    made = []
    original = _ByteLevelStream.push_all
    monkeypatch.setattr(_ByteLevelStream, "push_all", lambda self, ids: (made.append(ids), original(self, ids))[1])
    plain, stopping = bench.add("plain"), bench.add("stopping", stop=["zzz"])
    for text in ("ab", "c"):
        bench.step({"plain": text})
    assert not made
    assert bench.outputs.take(plain).outputs[0].text == "abc"
    assert len(made) == 1
    bench.step({"stopping": "a"})
    assert len(made) == 2
    assert bench.outputs.take(stopping).outputs[0].text == "a"


@pytest.mark.parametrize("take_at", [(), (1,), (0, 1, 2), (2,)])
def test_text_is_the_same_whenever_it_is_taken(bench, take_at):
    """Half a character is held back, said when it is whole, and marked when it never will be."""
    request = bench.add("r")
    pieces = []
    for number, ids in enumerate(([65, 0xC3], [0xA9, 66], [0xE2, 0x82])):
        bench.step({"r": [TOKENIZER.encode(chr(i))[0] if i < 128 else BYTE_IDS[i] for i in ids]})
        if number in take_at:
            pieces.append(bench.outputs.take(request).outputs[0].text)
    bench.step({}, finished={"r": LENGTH})
    pieces.append(bench.outputs.take(request).outputs[0].text)
    assert "".join(pieces) == bench.text(request) == "A\u00e9B\ufffd"


def test_a_summary_has_what_metrics_are_made_of(bench):
    bench.add(n=2, max_tokens=9)
    bench.step({}, first_scheduled={"r-0": 1.5, "r-1": 1.75})
    bench.step({"r-0": "a", "r-1": "x"})
    bench.step({"r-0": "bc"}, finished={"r-1": FinishInfo(reason="error", error="no", error_code="rejected")})
    [summary] = bench.step({}, finished={"r-0": LENGTH}).summaries
    assert (summary.finish_reason, summary.error_code) == ("error", "rejected")
    assert (summary.finish_reasons, summary.sample_lengths) == (("length", "error"), (3, 1))
    assert (summary.max_tokens, summary.priority, summary.num_output_tokens) == (9, 0, 4)
    metrics = summary.metrics
    assert (metrics.queue_time, metrics.prefill_time, metrics.decode_time) == (0.5, 1.5, 1.0)
    assert (metrics.inference_time, metrics.e2e_latency) == (2.5, 4.0)
    assert summary.time_per_output_token == 0.5


def test_a_summary_of_a_request_that_never_ran_has_no_times(bench):
    bench.add()
    [summary] = bench.step({}, finished={"r": FinishInfo(reason="abort")}).summaries
    metrics = summary.metrics
    assert (metrics.queue_time, metrics.prefill_time, metrics.decode_time, metrics.inference_time) == (None,) * 4
    assert (summary.time_per_output_token, summary.error_code) == (None, None)
