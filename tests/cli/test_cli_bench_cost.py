"""`interlace bench throughput --plugin-cost`: the table of what plugins cost, over a scripted engine."""

import json

import msgspec
import pytest

from interlace import Provider, hookimpl
from interlace.bench.session import StepCounter
from interlace.cli import main
from interlace.clock import MonotonicClock
from interlace.engine.front import Front
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import fake_assembly, front_spec

FLAGS = ("throughput", "--num-prompts", "2", "--input-len", "5", "--output-len", "4", "--num-warmups", "1")


class Costly(ScriptedClient):
    """An engine in which every step costs half a second of the scheduler and a millisecond of a processor."""

    def __init__(self):
        super().__init__(lambda request: [7] * request.params.max_tokens, clock=MonotonicClock())

    def _stats(self, *numbers):
        seconds = {"schedulers:mine": 0.5, "logits_processors:x": 0.001}
        return msgspec.structs.replace(super()._stats(*numbers), plugin_seconds=seconds)


@pytest.fixture
def clients(monkeypatch):
    clients = []

    def open_fake(loaded, plugins, clock):
        clients.append(Costly())
        spec = front_spec(257, max_model_len=400)
        return Front(fake_assembly(clients[-1], spec=spec, clock=clock, subscribers=(*plugins, Watch())))

    monkeypatch.setattr(Front, "open", open_fake)
    return clients


class Watch:
    @hookimpl
    def on_step(self):
        pass

    @hookimpl
    def interlace_kernels(self):
        yield Provider(name="none", target="nowhere:Nothing", api="1")


def test_costs_are_summed_over_the_timed_runs(clients, capsys):
    assert main(["bench", *FLAGS, "--repeat", "3", "--plugin-cost", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    scheduler, processor, subscriber = report["plugin_cost"]
    assert (scheduler["plugin"], processor["plugin"]) == ("schedulers:mine", "logits_processors:x")
    assert subscriber["plugin"] == "events:Watch:given in code"
    assert scheduler["seconds"] == pytest.approx(0.5 * report["steps"])
    assert scheduler["seconds_per_step"] == pytest.approx(0.5) and processor["seconds_per_step"] == pytest.approx(0.001)
    duration = sum(run["rates"]["duration_s"] for run in report["runs"])
    assert scheduler["share"] == pytest.approx(scheduler["seconds"] / duration)


def test_the_table_says_what_a_step_costs(clients, capsys):
    assert main(["bench", *FLAGS, "--plugin-cost"]) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if "schedulers:mine" in line)
    assert row[2] == "500,000.0"
    assert StepCounter.__name__ not in out, "the benchmark's own subscriber is no plugin of the engine"


def test_nobody_is_bothered_who_does_not_ask(clients, capsys):
    assert main(["bench", *FLAGS]) == 0
    assert "schedulers:mine" not in capsys.readouterr().out
    assert main(["bench", *FLAGS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plugin_cost"] is None


@pytest.mark.parametrize("text", ["3", "[1]", '{"x": 3}', "{x"])
def test_processors_are_a_table_of_tables(clients, capsys, text):
    assert main(["bench", "throughput", "--processors", text]) == 2
    assert "argument --processors: should be a JSON object of objects" in capsys.readouterr().err
    assert clients == []


def test_requests_name_a_processor_that_is_not_enabled(clients, capsys):
    assert main(["bench", *FLAGS, "--processors", '{"x": {}}']) == 2
    assert "logits_processors" in capsys.readouterr().err
