"""`LLM` and `Front` over a scripted engine."""

import gc
import logging
import os
import signal
import threading
import time

import pytest

from interlace import LLM, SamplingParams, hookimpl
from interlace.engine.front import Front
from interlace.errors import EngineDeadError, InvalidRequestError
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import byte_tokenizer, fake_assembly, front_spec

TOKENIZER = byte_tokenizer()


def echo(request):
    """Answers a prompt with itself."""
    return request.prompt_token_ids


def endless(request):
    return TOKENIZER.encode("again ") * 20


class Listener:
    """An event plugin that writes down what it hears."""

    def __init__(self):
        self.heard = []

    @hookimpl
    def on_engine_start(self, settings):
        self.heard.append(("start", settings["model"]))

    @hookimpl
    def on_step(self, stats):
        self.heard.append(("step", stats.num_sampled_tokens))

    @hookimpl
    def on_request_finished(self, summary):
        self.heard.append(("finished", summary.request_id, summary.finish_reason))

    @hookimpl
    def on_shutdown(self):
        self.heard.append(("shutdown",))


def make(client=None, **options) -> LLM:
    return LLM.from_front(Front(fake_assembly(client or ScriptedClient(echo), **options)))


@pytest.fixture
def llm():
    with make() as llm:
        yield llm


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


LONG = SamplingParams(max_tokens=100)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_results_are_in_the_order_of_the_prompts(llm):
    prompts = ["a long one, the last to finish", "b", "middle"]
    outputs = llm.generate(prompts, LONG)
    assert texts(outputs) == prompts
    assert [output.prompt for output in outputs] == prompts
    assert all(output.finished for output in outputs)


def test_one_prompt_or_many_of_every_form(llm):
    ids = TOKENIZER.encode("ids")
    chat = [{"role": "user", "content": "hi"}]
    rendered = "<user>hi\n<bot>"
    for prompts, expected in [
        ("one", ["one"]),
        (ids, ["ids"]),
        ({"prompt_token_ids": ids}, ["ids"]),
        (chat, [rendered]),
        ([], []),
        (["one", ids, {"prompt": "two"}, chat], ["one", "ids", "two", rendered]),
        ([ids, ids], ["ids", "ids"]),
        ([chat, chat], [rendered, rendered]),
    ]:
        assert texts(llm.generate(prompts, LONG)) == expected


def test_chat(llm):
    chat = [{"role": "user", "content": "hi"}]
    assert texts(llm.chat(chat, LONG)) == ["<user>hi\n<bot>"]
    assert texts(llm.chat([chat, chat], LONG, add_generation_prompt=False)) == ["<user>hi\n"] * 2
    for wrong in ("hi", [[1, 2]], [[]]):
        with pytest.raises(InvalidRequestError, match="prompt 0: chat takes lists of messages"):
            llm.chat(wrong)


def test_parameters_and_priorities_one_or_one_per_prompt():
    client = ScriptedClient(echo)
    with make(client) as llm:
        outputs = llm.generate(["aaaa", "bbbb"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=3)], [5, -1])
        assert texts(outputs) == ["a", "bbb"]
        assert [request.priority for request in client.added] == [5, -1]
        for wrong in ({"params": [LONG]}, {"priority": [1, 2, 3]}):
            with pytest.raises(InvalidRequestError, match="entries for 2 prompts"):
                llm.generate(["a", "b"], **wrong)


def test_nothing_starts_when_one_prompt_is_invalid():
    client = ScriptedClient(echo)
    with make(client) as llm:
        with pytest.raises(InvalidRequestError, match="prompt 1: the prompt is empty"):
            llm.generate(["fine", ""], LONG)
        assert client.added == []
        assert texts(llm.generate("fine", LONG)) == ["fine"]


def test_a_failing_request_does_not_hurt_the_others():
    client = ScriptedClient(echo, auto=False)
    with make(client) as llm:
        results = []
        thread = threading.Thread(target=lambda: results.extend(llm.generate(["bad", "good"], LONG)))
        thread.start()
        wait_until(lambda: len(client.running) == 2)
        client.step()
        client.fail(client.running[0], "no room", "kv_capacity")
        while client.running:
            client.step()
        thread.join(10)
        bad, good = results
        assert (bad.outputs[0].text, bad.outputs[0].finish_reason, bad.error) == ("b", "error", "no room")
        assert (good.outputs[0].text, good.error) == ("good", None)


def test_calls_from_two_threads_share_the_engine(llm):
    results = {}

    def call(name):
        results[name] = texts(llm.generate([f"{name}{i}" for i in range(5)], LONG))

    threads = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {name: [f"{name}{i}" for i in range(5)] for name in "ab"}


def test_n_answers(llm):
    [output] = llm.generate("xy", SamplingParams(n=3, max_tokens=9))
    assert [(o.index, o.text) for o in output.outputs] == [(0, "xy"), (1, "xy"), (2, "xy")]
    assert output.usage.completion_tokens == 6


def test_a_stop_string_aborts_in_the_engine():
    client = ScriptedClient(endless)
    with make(client) as llm:
        [output] = llm.generate("p", SamplingParams(max_tokens=100, stop=["n ag"]))
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("agai", "n ag")
        assert client.aborted == [output.request_id]


def test_engine_death_reaches_the_waiting_call_and_later_ones():
    client = ScriptedClient(endless, auto=False)
    with make(client) as llm:
        caught = []

        def call():
            try:
                llm.generate(["a", "b"], LONG)
            except EngineDeadError as error:
                caught.append(error)

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(client.running) == 4)
        client.die(MemoryError("out of blocks"))
        for thread in threads:
            thread.join(10)
        assert len(caught) == 2 and caught[0] is not caught[1]
        assert all(isinstance(error.__cause__, MemoryError) for error in caught)
        with pytest.raises(EngineDeadError, match="out of blocks"):
            llm.generate("c")


def test_ctrl_c_aborts_what_is_outstanding_and_leaves_the_engine_usable():
    client = ScriptedClient(endless, auto=False)
    with make(client) as llm:

        def interrupt():
            wait_until(lambda: len(client.running) == 2)
            client.step()
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], LONG)
        thread.join(10)
        assert len(client.aborted) == 2 and client.running == []
        client.step()
        stepping = threading.Thread(
            target=lambda: (wait_until(lambda: client.running), [client.step() for _ in range(2)])
        )
        stepping.start()
        assert texts(llm.generate("c", SamplingParams(max_tokens=2))) == ["ag"]
        stepping.join(10)


def test_events_and_their_order():
    listener = Listener()
    llm = make(subscribers=(listener,))
    [output] = llm.generate("ab", LONG)
    llm.close()
    llm.close()
    assert listener.heard[0][0] == "start"
    assert listener.heard[1:] == [
        ("step", 1),
        ("step", 1),
        ("finished", output.request_id, "length"),
        ("shutdown",),
    ]


def test_closing_fails_what_is_under_way_and_later_calls():
    llm = make(ScriptedClient(endless, auto=False))
    caught = []

    def call():
        try:
            llm.generate("a", LONG)
        except EngineDeadError as error:
            caught.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: llm.front._outputs.num_active)
    llm.close()
    thread.join(10)
    assert caught == ["the engine was shut down"]
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate("b")


def test_an_llm_that_is_dropped_closes_its_engine():
    listener = Listener()
    llm = make(subscribers=(listener,))
    del llm
    gc.collect()
    assert listener.heard[-1] == ("shutdown",)


def test_a_bug_while_processing_a_step_fails_the_waiters_instead_of_hanging(monkeypatch):
    with make() as llm:

        def broken(step):
            raise RuntimeError("a bug")

        monkeypatch.setattr(llm.front._outputs, "process", broken)
        with pytest.raises(EngineDeadError, match="could not be processed: RuntimeError: a bug") as caught:
            llm.generate("a", LONG)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_failed_start_is_passed_on_and_cleaned_up():
    class Broken(ScriptedClient):
        stopped = False

        def start(self, on_output, on_death, on_event=None):
            raise MemoryError("no memory for the KV cache")

        def shutdown(self):
            self.stopped = True

    client = Broken(echo)
    with pytest.raises(MemoryError, match="KV cache"):
        make(client)
    assert client.stopped


def test_the_start_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="interlace"), make() as llm:
        text = caplog.text
        assert "model: fake (FakeForCausalLM), float32 on cpu, up to 128 tokens" in text
        assert "scheduler: fake (for a test)" in text
        assert "kv cache: 1024 blocks of 16 tokens, 4 MiB" in text
        assert "started in: 0.00 s (assemble 0.00 s, import 0.10 s, weights 0.20 s)" in text
        assert llm.front.health().status == "ok"


def test_same_settings_seed_same_request_seeds():
    def seeds(seed):
        client = ScriptedClient(echo)
        with make(client, spec=front_spec(TOKENIZER.vocab_size, seed=seed)) as llm:
            llm.generate(["a", "b"])
        return [request.seed for request in client.added]

    assert seeds(1) == seeds(1) != seeds(2)


def test_progress_is_a_bar_on_a_terminal_only(llm, capsys, monkeypatch):
    llm.generate(["a", "b"], LONG)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    llm.generate(["a", "b"], LONG)
    out, err = capsys.readouterr()
    assert out == "" and "Generating" in err and "2/2" in err and "tok/s" in err
    llm.generate(["a", "b"], LONG, progress=False)
    assert capsys.readouterr() == ("", "")
