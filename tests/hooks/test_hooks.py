"""Every hook, one by one: called with what it is said to be called with, listed with where it came from.

`test_every_hook_has_a_test` holds this file to that.
"""

from __future__ import annotations

import inspect
import types
from pathlib import Path

import pytest

from interlace import Provider, hookimpl, hookspecs
from interlace.config import effective, load_settings
from interlace.contracts import CONTRACTS, load_target
from interlace.plugin_manager import PluginManager
from interlace.testing import docs

HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if inspect.isfunction(function) and name.startswith(("interlace_", "on_"))
}


def offered(kind: str) -> None:
    """A provider of `kind` given by a plugin is listed once, with its origin; the built-in ones stay."""
    calls = []

    def hook():
        calls.append(kind)
        yield Provider(name="mine", target="nowhere:Mine", summary="a summary", api=hookspecs.KINDS[kind])

    plugin = types.ModuleType("my_package")
    setattr(plugin, f"interlace_{kind}", hookimpl(hook))
    manager = PluginManager(load_settings(env={}).settings, [plugin])
    built_in = PluginManager(load_settings(env={}).settings).registry(kind)
    registry = manager.registry(kind)
    assert set(registry.names()) == {*built_in.names(), "mine"} and len(built_in) > 0
    offer = registry.get("mine")
    assert (offer.qualified, offer.provider.summary) == ("my_package:mine", "a summary")
    assert calls == [kind], "a catalogue hook is called once"
    for other in set(CONTRACTS) - {kind}:
        assert "mine" not in manager.registry(other)


def test_hook_interlace_models():
    offered("models")


def test_hook_interlace_schedulers():
    offered("schedulers")


def test_hook_interlace_orderings():
    offered("orderings")


def test_hook_interlace_attention():
    offered("attention")


def test_hook_interlace_executors():
    offered("executors")


def test_hook_interlace_checkpoints():
    offered("checkpoints")


def test_hook_interlace_kernels():
    offered("kernels")


def test_hook_interlace_logits_processors():
    offered("logits_processors")


def test_hook_interlace_routers():
    offered("routers")


def heard(hook: str, *arguments):
    """What a subscriber of `hook` with its full argument list is called with."""
    calls = []
    names = list(inspect.signature(HOOKS[hook]).parameters)
    function = eval(f"lambda {', '.join(names)}: calls.append(({', '.join(names)},))", {"calls": calls})
    plugin = types.ModuleType("listener")
    setattr(plugin, hook, hookimpl(function))
    events = PluginManager(load_settings(env={}).settings, [plugin]).events
    getattr(events, hook)(*arguments)
    return calls


def test_hook_on_engine_start():
    settings = effective(load_settings({"server.api_keys": ["top-secret"]}, env={}))
    ((seen,),) = heard("on_engine_start", settings)
    assert seen["scheduler"]["use"] == "fcfs" and "top-secret" not in str(seen)


def test_hook_on_step():
    stats = object()
    assert heard("on_step", stats) == [(stats,)]


def test_hook_on_request_finished():
    summary = object()
    assert heard("on_request_finished", summary) == [(summary,)]


def test_hook_on_shutdown():
    plugin, calls = types.ModuleType("listener"), []
    plugin.on_shutdown = hookimpl(lambda: calls.append("down"))
    PluginManager(load_settings(env={}).settings, [plugin]).events.on_shutdown()
    assert calls == ["down"]


def test_every_hook_has_a_test():
    assert {f"test_hook_{name}" for name in HOOKS} == {name for name in globals() if name.startswith("test_hook_")}


def test_kinds_hooks_and_contracts_agree():
    assert [f"interlace_{kind}" for kind in hookspecs.KINDS] == [name for name in HOOKS if name.startswith("interlace")]
    assert list(CONTRACTS) == list(hookspecs.KINDS)
    sections = {contract.section for contract in CONTRACTS.values()} - {""}
    assert sections <= set(effective(load_settings(env={})))


@pytest.mark.parametrize("kind", CONTRACTS)
def test_built_in_providers_keep_their_contract(kind):
    registry = PluginManager(load_settings(env={}).settings).registry(kind)
    base = load_target(CONTRACTS[kind].base, kind)
    for offer in registry:
        assert issubclass(offer.load(), base) and offer.provider.summary
        if CONTRACTS[kind].section:
            for setting in docs.describe(offer.options_model()):
                assert setting.description, f"{offer.name}.{setting.key} has no description"


@pytest.mark.parametrize("hook", HOOKS)
def test_documented_with_exact_arguments(hook, repo_root):
    arguments = ", ".join(
        str(parameter).replace("'", "") for parameter in inspect.signature(HOOKS[hook]).parameters.values()
    )
    assert f"def {hook}({arguments}) ->" in (repo_root / "docs" / "hooks.md").read_text("utf-8")


def test_generated_pages_are_up_to_date(repo_root, capsys):
    assert docs.main([str(repo_root / "docs"), "--check"]) == 0, capsys.readouterr().err


def test_check_catches_a_stale_page(tmp_path: Path, capsys):
    assert docs.main([str(tmp_path), "--check"]) == 1
    assert docs.main([str(tmp_path)]) == 0
    assert docs.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "config.md").write_text("old")
    assert docs.main([str(tmp_path), "--check"]) == 1
    message = capsys.readouterr().err
    assert f"out of date: {tmp_path / 'config.md'}." in message
    assert (tmp_path / "config.md").read_text() == "old"
