"""Plugins of several packages put together in the configuration: orderings under a scheduler, logits processors."""

from __future__ import annotations

import json
import threading

import msgspec
import pytest

from interlace import Provider, cli, hookimpl
from interlace.assemble import make_client
from interlace.clock import MonotonicClock
from interlace.config import load_settings
from interlace.errors import (
    ConfigError,
    PluginConflictError,
    PluginContractError,
    PluginError,
    PluginImportError,
    PluginNotFoundError,
    PluginOptionsError,
)
from interlace.messages import EngineRequest, SamplingParams
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve, select_components
from interlace.spec import Component, SchedulerLimits
from interlace.testing.executor import scripted_spec

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BOTH = pytest.mark.parametrize("process", ["inline", "subprocess"])


def select(settings=None, config_file=None, kind="schedulers", extra=()) -> tuple[Component, ...]:
    loaded = load_settings(settings or {}, config_file=config_file, env={})
    return select_components(loaded, PluginManager(loaded.settings, extra))[kind]


def ordered(*names, **more) -> dict:
    return {"scheduler.use": "ordered", "scheduler.options.ordered.order": list(names), **more}


# ── orderings: what is chosen ───────────────────────────────────────────────────────────────────────────────────


def test_orderings_of_two_packages_from_a_file(install, tmp_path):
    install("vips", "evens")
    file = tmp_path / "engine.toml"
    file.write_text(
        '[scheduler]\nuse = "ordered"\n[scheduler.options.ordered]\norder = ["vips", "evens", "fcfs"]\n'
        '[orderings.options.vips]\nusers = ["ann"]\n'
    )
    (scheduler,) = select(config_file=file)
    used = scheduler.uses["order"]
    assert [(part.kind, part.name, part.package) for part in used] == [
        ("orderings", "vips", "interlace-vips"),
        ("orderings", "evens", "interlace-evens"),
        ("orderings", "fcfs", "interlace"),
    ]
    assert used[0].options == {"users": ["ann"]}
    assert used[0].reason == "scheduler.options.ordered.order, file engine.toml"
    assert scheduler.label == "ordered (vips, evens, fcfs)"
    policy = scheduler.build()
    assert [type(function.__self__).__name__ for function in policy._functions] == ["Vips", "Evens", "Fcfs"]


def test_what_is_used_travels_as_plain_data(install):
    install("vips")
    (scheduler,) = select(ordered("vips", "priority", **{"orderings.options.priority.aging_s": 3}))
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(scheduler), type=Component)
    assert arrived == scheduler
    assert arrived.build()._functions[1].__self__.options.aging_s == 3.0


def test_options_of_orderings_are_checked_whether_used_or_not():
    for name in ("priority", "fcfs"):
        with pytest.raises(PluginOptionsError) as caught:
            select(ordered(name, **{"orderings.options.priority.agin_s": 3}))
        assert "Did you mean 'orderings.options.priority.aging_s'?" in str(caught.value)
    with pytest.raises(PluginOptionsError, match=r"no ordering is called 'prority'. Did you mean 'priority'\?"):
        select({"orderings.options.prority.aging_s": 3})


@pytest.mark.parametrize(
    ("order", "kind", "expected"),
    [
        (
            ["fewest-remainig"],
            PluginNotFoundError,
            "no ordering is called 'fewest-remainig' (scheduler.options.ordered.",
        ),
        (["fewest-remainig"], PluginNotFoundError, "order, constructor). Did you mean 'fewest-remaining'?"),
        (
            ["fcfs", "shared"],
            PluginConflictError,
            "qualified name: 'interlace-evens:shared' or 'interlace-vips:shared'",
        ),
        (["keyless"], PluginContractError, "lacks key of interlace.interfaces.ordering.Ordering (contract version 1)"),
        (["unimportable"], PluginImportError, "ordering 'unimportable' (interlace-vips 1.1) cannot be imported"),
        (["future"], PluginContractError, "version 2 of the orderings contract"),
        (["fcfs", "vips", "fcfs"], ConfigError, "(constructor) names ordering 'fcfs' (interlace 0.1.0) twice"),
        ([], PluginOptionsError, "scheduler.options.ordered.order = '[]' (constructor): list should have at least 1"),
        (["interlace-evens:sharde"], PluginNotFoundError, "no ordering is called 'interlace-evens:sharde'"),
    ],
)
def test_what_is_wrong_with_an_order_is_said_before_anything_starts(install, order, kind, expected):
    install("vips", "evens")
    with pytest.raises(kind) as caught:
        select(ordered(*order))
    assert expected in str(caught.value)


def test_qualified_names_use_two_plugins_of_one_name(install):
    install("vips", "evens")
    names = ["interlace-vips:shared", "interlace-evens:shared"]
    (scheduler,) = select(ordered(*names, **{"orderings.options": {"interlace-vips:shared": {"users": ["ann"]}}}))
    first, second = scheduler.uses["order"]
    assert (first.package, second.package) == ("interlace-vips", "interlace-evens")
    assert (first.options, second.options) == ({"users": ["ann"]}, {})
    assert scheduler.label == "ordered (interlace-vips:shared, interlace-evens:shared)"


def test_a_scheduler_may_use_a_scheduler_but_not_itself(install):
    install("vips")
    use = {"scheduler.use": "circular"}
    (outer,) = select({**use, "scheduler.options": {"circular": {"inner": "ordered"}, "ordered": {"order": ["vips"]}}})
    assert outer.label == "circular (ordered (vips))"
    assert [part.name for part in outer.family] == ["circular", "ordered", "vips"]
    assert type(outer.build().inner).__name__ == "Ordered"
    with pytest.raises(ConfigError, match=r"which uses scheduler 'circular' .*: no plugin can use itself"):
        select(use)


def test_a_wrong_declaration_is_the_plugins_fault(install):
    install("vips")
    with pytest.raises(PluginContractError, match=r"scheduler 'mistaken' .* its option 'options' names orderngs"):
        select({"scheduler.use": "mistaken"})


def test_installing_an_ordering_changes_nothing(install):
    before = select(), select(ordered("fcfs"))
    install("vips", "evens")
    assert (select(), select(ordered("fcfs"))) == before


def test_the_plan_and_the_command_line_show_it(capsys, smollm2_path):
    flags = ["--scheduler.use", "ordered", "--scheduler.options.ordered.order", "priority,fewest-remaining"]
    flags += ["--orderings.options.priority.aging_s", "30", "--model", str(smollm2_path), "--device", "cpu"]
    assert cli.main(["config", "plan", *flags]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    place = next(number for number, row in enumerate(rows) if row[:2] == ["schedulers", "ordered"])
    assert [row[:2] for row in rows[place + 1 : place + 3]] == [
        ["orderings", "priority"],
        ["orderings", "fewest-remaining"],
    ]
    assert rows[place + 1][-3:] == ["scheduler.options.ordered.order,", "command", "line"]
    assert cli.main(["config", "explain", "orderings.options.priority.aging_s", *flags]) == 0
    assert "here:        30.0 (command line)" in capsys.readouterr().out


# ── orderings: what runs ────────────────────────────────────────────────────────────────────────────────────────


@BOTH
def test_orderings_decide_in_the_engine(install, monkeypatch, process):
    folders = install("vips", "evens")
    monkeypatch.setenv("PYTHONPATH", ":".join(folders))
    (scheduler,) = select(ordered("vips", "evens", **{"orderings.options.vips.users": ["ann"]}))
    spec = msgspec.structs.replace(
        scripted_spec("nowhere:Nothing", limits=SchedulerLimits(max_num_seqs=1)), scheduler=scheduler
    )
    client = make_client(spec, process, MonotonicClock())
    first: list[str] = []
    seconds: list[set[str]] = []
    done = threading.Event()

    def on_output(output):
        first.extend(output.first_scheduled)
        seconds.append(set(output.stats.plugin_seconds))
        if len(first) == 4:
            done.set()

    client.start(on_output, lambda error: done.set())
    try:
        users = {"odd": "bob", "even": "bob", "odd_vip": "ann", "even_vip": "ann"}
        client.add([request(name, [1] * (2 if "even" in name else 3), user) for name, user in users.items()])
        assert done.wait(20)
    finally:
        client.shutdown()
    assert first == ["even_vip", "odd_vip", "even", "odd"]
    assert set.union(*seconds) == {"schedulers:ordered"}


def request(name, prompt, user) -> EngineRequest:
    params = SamplingParams(max_tokens=1)
    return EngineRequest(
        id=name, prompt_token_ids=prompt, params=params, arrival_time=0.0, seed=0, labels={"user": user}
    )


@BOTH
def test_a_selected_plugin_that_cannot_be_made_stops_the_start_with_the_cause(install, monkeypatch, process):
    monkeypatch.setenv("PYTHONPATH", install("vips")[0])
    (scheduler,) = select({"scheduler.use": "fragile"})
    spec = msgspec.structs.replace(scripted_spec("nowhere:Nothing"), scheduler=scheduler)
    client = make_client(spec, process, MonotonicClock())
    with pytest.raises(PluginError) as caught:
        client.start(lambda output: None, lambda error: None)
    client.shutdown()
    assert str(caught.value) == "scheduler 'fragile' (interlace-vips 1.1) cannot be set up: KeyError: 'licence'"
    assert "licence" in str(caught.value.__cause__)


# ── logits processors ───────────────────────────────────────────────────────────────────────────────────────────


class Processors:
    """Three of them, under names that are not in the order of the alphabet."""

    @staticmethod
    @hookimpl
    def interlace_logits_processors():
        for name in ("double", "add", "cap"):
            yield Provider(name=name, target=f"{__name__}:Nothing", api="1")


@pytest.mark.parametrize("names", [["cap", "double", "add"], ["add", "cap"], []])
def test_processors_are_chosen_in_declared_order(names):
    chosen = select({"logits_processors.use": names}, kind="logits_processors", extra=[Processors])
    assert [part.name for part in chosen] == names


def test_a_processor_named_twice_is_refused():
    with pytest.raises(
        ConfigError, match=r"logits_processors.use \(constructor\) names logits processor 'add' .* twice"
    ):
        select({"logits_processors.use": ["add", "cap", "add"]}, kind="logits_processors", extra=[Processors])


def test_processors_of_one_name_are_called_by_what_the_configuration_calls_them():
    def plugin(package):
        class Same:
            __name__ = package

            @hookimpl
            def interlace_logits_processors(self):
                yield Provider(name="same", target=f"{package}:Same", api="1")

        return Same()

    names = ["second:same", "first:same"]
    chosen = select(
        {"logits_processors.use": names}, kind="logits_processors", extra=[plugin("first"), plugin("second")]
    )
    assert [(part.name, part.target) for part in chosen] == [
        ("second:same", "second:Same"),
        ("first:same", "first:Same"),
    ]


@pytest.mark.parametrize(
    ("kind", "process"),
    [
        ("attention", "inline"),
        ("attention", "subprocess"),
        ("kernels", "inline"),
        ("logits_processors", "inline"),
        ("models", "inline"),
    ],
)
def test_whatever_kind_it_is_the_start_says_which_plugin_failed(install, monkeypatch, kind, process, tmp_path):
    monkeypatch.setenv("PYTHONPATH", install("vips")[0])
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    settings = {"model": str(tmp_path / "config.json"), "checkpoint.use": "dummy", "device": "cpu"}
    loaded = load_settings({**settings, "cache.memory": "1MiB"}, env={})
    spec = resolve(loaded, PluginManager(loaded.settings))
    broken = Component(
        kind=kind, name="fragile", target=f"interlace_vips_heavy:Fragile_{kind}", package="interlace-vips"
    )
    change = {"models": {"architecture": broken}}.get(kind, {kind: (broken,)})
    client = make_client(msgspec.structs.replace(spec, **change), process, MonotonicClock())
    with pytest.raises(PluginError) as caught:
        client.start(lambda output: None, lambda error: None)
    client.shutdown()
    assert str(caught.value).endswith("'fragile' (interlace-vips) cannot be set up: OSError: no driver")
    assert "no driver" in str(caught.value.__cause__)
