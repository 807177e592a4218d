"""Contract versions: what was written for a former one goes on working for a while, and says so once.

The example change: version 2 of the schedulers contract calls `order_key` what version 1 called `sort_key`
(tests/fixtures/aged). The kernels are changed likewise, to see an adapter at work in a worker.
"""

from __future__ import annotations

import json
import logging
import threading

import msgspec
import pytest
from packaging.version import Version

from interlace import __version__, hookspecs
from interlace.config import load_settings
from interlace.contracts import CONTRACTS, Adapter
from interlace.engine.subprocess_client import SubprocessClient
from interlace.errors import PluginContractError
from interlace.messages import EngineRequest, SamplingParams
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve
from interlace.spec import Component, SchedulerLimits
from interlace.testing.executor import scripted_spec
from interlace.testing.harness import EngineHarness

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def future(install, monkeypatch):
    """This process is an Interlace whose schedulers contract is at version 2; the aged package is installed."""
    folders = install("aged")
    import interlace_aged_future

    monkeypatch.setitem(hookspecs.KINDS, "schedulers", interlace_aged_future.VERSION)
    monkeypatch.setitem(CONTRACTS, "schedulers", interlace_aged_future.CONTRACT)
    return folders


def component(name: str) -> Component:
    return PluginManager(load_settings(env={}).settings).registry("schedulers").get(name).component()


def finishing_order(scheduler) -> list[str]:
    """Ids by length of prompt, in the order in which one seat serves them."""
    harness = EngineHarness(scheduler, limits=SchedulerLimits(max_num_seqs=1))
    ids = {harness.add(list(range(1, length + 1)), max_tokens=2): length for length in (3, 9, 6)}
    harness.run()
    return [ids[request_id] for request_id in sorted(ids, key=lambda i: harness.records[i].last_step)]


@pytest.mark.parametrize(
    ("name", "order"), [("former", [9, 6, 3]), ("current", [9, 6, 3]), ("former_plain", [3, 9, 6])]
)
def test_a_former_version_is_adapted_and_the_current_one_left_alone(future, name, order):
    import interlace_aged_schedulers

    found = component(name).load()
    assert finishing_order(found(found.Options())) == order
    assert finishing_order(found(found.Options(sign=1))) == sorted(order) if name != "former_plain" else order
    assert (found is interlace_aged_schedulers.Current) == (name == "current")


def resolve_with(tmp_path, settings):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    loaded = load_settings({"model": str(path), "checkpoint.use": "dummy", "device": "cpu"} | settings, env={})
    return resolve(loaded, PluginManager(loaded.settings))


def test_one_warning_line_names_package_version_change_and_end(future, tmp_path, caplog):
    spec = resolve_with(tmp_path, {"scheduler.use": "former"})
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            logging.WARNING,
            "scheduler 'former' (interlace-aged 1.4) is written for version 1 of the schedulers contract; the current "
            "one is 2: `sort_key` is called `order_key`. It is adapted until Interlace 0.6: upgrade interlace-aged",
        )
    ]
    assert spec.scheduler.load()(spec.scheduler.load_options(spec.scheduler.load())).options.sign == -1
    assert len(caplog.records) == 1, "loading warns again"


@pytest.mark.parametrize("name", ["current", "fcfs"])
def test_the_current_version_is_silent(future, tmp_path, caplog, monkeypatch, name):
    if name == "fcfs":  # a built-in that nobody forgot to bring up to date, and an aged package that is not selected
        monkeypatch.setitem(hookspecs.KINDS, "schedulers", "1")
        monkeypatch.setitem(CONTRACTS, "schedulers", CONTRACTS["schedulers"]._replace(adapters={}))
    resolve_with(tmp_path, {"scheduler.use": name})
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("ancient", "it is too old. Upgrade interlace-aged, or install an older interlace"),
        ("coming", "it is too new. Upgrade interlace, or install an older interlace-aged"),
    ],
)
def test_beyond_the_adapters_both_versions_and_the_cure_are_named(future, tmp_path, name, end):
    version = {"ancient": "0", "coming": "3"}[name]
    with pytest.raises(PluginContractError) as caught:
        resolve_with(tmp_path, {"scheduler.use": name})
    assert str(caught.value) == (
        f"scheduler '{name}' (interlace-aged 1.4) is written for version {version} of the schedulers contract; this "
        f"Interlace, {__version__}, speaks 2, and 1 until 0.6: {end}"
    )


def test_after_the_adapter_is_gone_the_former_version_is_too_old(future, monkeypatch):
    monkeypatch.setitem(CONTRACTS, "schedulers", CONTRACTS["schedulers"]._replace(adapters={}))
    with pytest.raises(PluginContractError, match=r"version 1 of .* speaks 2: it is too old\. Upgrade interlace-aged"):
        component("former")


def test_adapters_form_a_chain(future, monkeypatch):
    def adapt_2_to_3(former):
        return type(former.__name__, (former,), {"starvation_free": True})

    earlier = CONTRACTS["schedulers"].adapters
    both = {**earlier, "2": Adapter(adapt_2_to_3, "`starvation_free` is a claim", until="0.7")}
    monkeypatch.setitem(hookspecs.KINDS, "schedulers", "3")
    monkeypatch.setitem(CONTRACTS, "schedulers", CONTRACTS["schedulers"]._replace(adapters=both))
    former, current, coming = map(component, ("former", "current", "coming"))
    assert former.load().starvation_free and current.load().starvation_free and not coming.load().starvation_free
    assert finishing_order(former.load()(former.load().Options())) == [9, 6, 3]
    assert "`order_key`; `starvation_free` is a claim. It is adapted until Interlace 0.6:" in former.deprecation
    assert "is 3: `starvation_free` is a claim. It is adapted until Interlace 0.7:" in current.deprecation
    assert coming.deprecation is None


def serve(spec) -> list[str]:
    """Ids in the order in which an engine process with one seat finishes them: prompts of 3, 9 and 6 tokens."""
    order, done = [], threading.Event()

    def on_output(output):
        order.extend(output.finished)
        if len(order) == 3:
            done.set()

    client = SubprocessClient(spec)
    client.start(on_output, lambda error: done.set())
    try:
        client.add([request(length) for length in (3, 9, 6)])
        assert done.wait(60)
    finally:
        client.shutdown()
    return order


def request(length: int) -> EngineRequest:
    params = SamplingParams(max_tokens=2)
    return EngineRequest(
        id=str(length), prompt_token_ids=[*range(1, length + 1)], params=params, arrival_time=0.0, seed=1
    )


def scripted(future, monkeypatch, api: str):
    """An engine of the former scheduler in a process of its own, which speaks version 2 as this one does."""
    monkeypatch.setenv("PYTHONPATH", future[0])
    executor = "interlace_aged_future:ExecutorOfTheFuture"
    spec = scripted_spec("interlace_aged_schedulers:Former", executor=executor, limits=SchedulerLimits(max_num_seqs=1))
    scheduler = msgspec.structs.replace(spec.scheduler, api=api, package="interlace-aged", version="1.4")
    return msgspec.structs.replace(spec, scheduler=scheduler)


def test_adapted_in_the_engine_process(future, monkeypatch):
    assert serve(scripted(future, monkeypatch, "1")) == ["9", "6", "3"]


def test_too_old_in_the_engine_process_reads_the_same_in_the_parent(future, monkeypatch):
    with pytest.raises(PluginContractError, match=r"interlace-aged 1\.4\) is written for version 0 .* it is too old"):
        serve(scripted(future, monkeypatch, "0"))


def test_adapted_in_the_worker(install, tmp_path, monkeypatch, caplog):
    """Kernels load in workers only. Here version 2 calls `rms_norm` what version 1 called `rmsnorm`."""
    import torch

    from interlace.worker.sizing import plan_kernels

    def adapt_1_to_2(former):
        return type(former.__name__, (former,), {"rms_norm": former.rmsnorm})

    install("aged")
    monkeypatch.setitem(hookspecs.KINDS, "kernels", "2")
    adapters = {"1": Adapter(adapt_1_to_2, "`rmsnorm` is called `rms_norm`", until="0.6")}
    monkeypatch.setitem(CONTRACTS, "kernels", CONTRACTS["kernels"]._replace(adapters=adapters))
    spec = resolve_with(tmp_path, {"kernels.use": "former"})
    spec = msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=type(spec))  # as it reaches a worker
    kernels, selections = plan_kernels(spec)
    assert kernels.rms_norm(torch.ones(1), None, 0.0, False).tolist() == [42.0]
    assert (selections[0].name, selections[0].reason) == ("former", "rms_norm")
    assert [record.getMessage().partition(" is written")[0] for record in caplog.records] == [
        "kernel set 'former' (interlace-aged 1.4)"
    ]


def expired(contracts, release: str) -> list[str]:
    """Adapters that should be gone by `release`, or that lead nowhere."""
    return [
        f"{contract.kind} {version}"
        for contract in contracts
        for version, adapter in contract.adapters.items()
        if Version(adapter.until) <= Version(release)
        or not adapter.change
        or int(version) >= int(contract.version)
        or (str(int(version) + 1) != contract.version and str(int(version) + 1) not in contract.adapters)
    ]


def test_no_adapter_outlives_its_promise(future):
    assert not expired([contract for kind, contract in CONTRACTS.items() if kind != "schedulers"], __version__)
    aged = CONTRACTS["schedulers"]
    assert expired([aged], "0.5") == [] and expired([aged], "0.6") == expired([aged], "1.0") == ["schedulers 1"]


@pytest.mark.parametrize("kind", CONTRACTS)
def test_every_contract_states_its_version(kind):
    module = __import__(CONTRACTS[kind].base.partition(":")[0], fromlist=["x"])
    assert f"(version {CONTRACTS[kind].version})" in module.__doc__
