"""Discovery: what is imported, what is kept out, and what a plugin that fails does to the others."""

from __future__ import annotations

import logging
import sys
import types

import pytest

from interlace import Provider, hookimpl
from interlace.config import load_settings
from interlace.errors import PluginContractError, PluginError, PluginImportError, PluginNotFoundError
from interlace.plugin_manager import PluginManager, find_installed


def manager(*extra, **plugins) -> PluginManager:
    return PluginManager(load_settings({"plugins": plugins}, env={}).settings, extra)


class Sjf:
    """A plugin given in code."""

    @staticmethod
    @hookimpl
    def interlace_schedulers():
        yield Provider(name="sjf", target="__main__:Sjf", api="1")


def test_built_in_plugins_are_found_through_entry_points():
    plugins = manager()
    assert not plugins.failures and not plugins.blocked
    assert {"fcfs", "priority"} <= set(plugins.registry("schedulers").names())
    origin = plugins.registry("schedulers").get("fcfs").origin
    assert (origin.package, origin.entry_point) == ("interlace", "schedulers") and origin.version


def test_installed_distribution_is_found_with_its_version(install):
    install("demo")
    offer = manager().registry("schedulers").get("demo")
    assert (offer.origin.package, offer.origin.version, offer.qualified) == (
        "interlace-demo",
        "1.2",
        "interlace-demo:demo",
    )
    assert "interlace_demo_schedulers" not in sys.modules, "a target is imported only when it is selected"


def test_plugin_that_cannot_be_imported_is_one_warning(install, caplog):
    install("broken", "demo")
    with caplog.at_level(logging.WARNING):
        plugins = manager()
    assert "demo" in plugins.registry("schedulers")
    (failure,) = plugins.failures
    assert (failure.origin.package, failure.origin.version) == ("interlace-broken", "0.1")
    assert isinstance(failure.error, ImportError)
    (record,) = caplog.records
    assert "'broken' of interlace-broken 0.1 (ImportError: libfast.so.3 is missing)" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("block", ["interlace-blocked", "Interlace_Blocked", "interlace-blocked:blocked"])
def test_blocked_plugin_is_never_imported(install, block):
    install("blocked")
    plugins = manager(block=[block])
    assert [origin.package for origin in plugins.blocked] == ["interlace-blocked"]
    assert "interlace_blocked" not in sys.modules and not plugins.failures


def test_allow_list_keeps_others_out_but_not_the_built_in(install):
    install("demo", "blocked")
    plugins = manager(allow=["interlace-demo"])
    assert {"demo", "fcfs"} <= set(plugins.registry("schedulers").names())
    assert [origin.package for origin in plugins.blocked] == ["interlace-blocked"]
    assert "demo" not in manager(allow=["interlace-demo"], block=["interlace-demo", "interlace-blocked"]).registry(
        "schedulers"
    )


def test_built_in_can_be_blocked_by_name():
    plugins = manager(block=["interlace:schedulers"])
    assert not plugins.registry("schedulers").names() and plugins.registry("executors").names()
    assert not manager(block=["interlace"]).registry("executors").names()


def test_discovery_does_not_depend_on_the_order_of_the_path(install):
    install("rival", "demo")
    first = [offer.qualified for offer in manager().registry("schedulers")]
    sys.path.reverse()
    try:
        assert [offer.qualified for offer in manager().registry("schedulers")] == first
    finally:
        sys.path.reverse()


def test_slips_pluggy_does_not_see_are_failures(install):
    install("misspelt")
    errors = {failure.origin.entry_point: failure.error for failure in manager().failures}
    assert all(isinstance(error, PluginContractError) for error in errors.values())
    assert "unknown hook 'on_stepp'. Did you mean 'on_step'? Hooks: " in str(errors["stepp"])
    assert "unknown hook 'interlace_schedulres'. Did you mean 'interlace_schedulers'?" in str(errors["schedulres"])
    assert "interlace_schedulers is named like a hook but lacks the @hookimpl marker" in str(errors["unmarked"])
    assert "lost" not in manager().registry("schedulers")


def in_code(**hooks) -> types.ModuleType:
    module = types.ModuleType("notebook")
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


def test_plugins_given_in_code():
    plugins = manager(Sjf(), Sjf)
    assert [offer.origin.entry_point for offer in plugins.registry("schedulers") if offer.name == "sjf"] == [
        "given in code",
        "given in code",
    ]
    assert "sjf" not in manager().registry("schedulers")


def test_installed_plugin_given_in_code_counts_once(install):
    install("demo")
    import interlace_demo

    names = [offer.qualified for offer in manager(interlace_demo).registry("schedulers")]
    assert names.count("interlace-demo:demo") == 1


def wrapper():
    yield


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ({"on_stepp": lambda: None}, "Did you mean 'on_step'"),
        ({"on_step": lambda statistics: None}, "can not be found in the hookspec"),
        ({"interlace_kernels": lambda: ["torch"]}, "interlace_kernels should give Provider records and gave 'torch'"),
        ({"interlace_kernels": lambda: [Provider(name="x", target="module")]}, "target ('module:Class') are needed"),
    ],
)
def test_mistakes_in_code_raise_at_once(hooks, expected):
    with pytest.raises(PluginContractError) as caught:
        manager(in_code(**hooks))
    assert expected in str(caught.value)


def test_hook_wrappers_are_refused():
    module = types.ModuleType("notebook")
    module.on_step = hookimpl(wrapper=True)(wrapper)
    with pytest.raises(PluginContractError, match=r"on_step is a hook wrapper"):
        manager(module)


def test_catalogue_hook_that_raises_is_set_aside(install, monkeypatch):
    install("demo")
    import interlace_demo

    def explode():
        yield Provider(name="half", target="a:B", api="1")
        raise OSError("no licence")

    monkeypatch.setattr(interlace_demo, "interlace_schedulers", hookimpl(explode))
    plugins = manager()
    assert "half" not in plugins.registry("schedulers") and "fcfs" in plugins.registry("schedulers")
    assert [str(failure.error) for failure in plugins.failures] == ["no licence"]


@pytest.mark.parametrize(
    ("require", "kind", "expected"),
    [
        (["interlace-sjf>=0.2"], PluginNotFoundError, "is not installed. Install it: pip install 'interlace-sjf>=0.2'"),
        (["interlace-demo>=2"], PluginNotFoundError, "is not met: interlace-demo 1.2 is installed"),
        (["interlace-broken"], PluginImportError, "is installed but failed to load: 'broken' of interlace-broken 0.1"),
    ],
)
def test_requirements(install, require, kind, expected):
    install("demo", "broken")
    with pytest.raises(kind) as caught:
        manager(require=require)
    assert expected in str(caught.value)
    if kind is PluginImportError:
        assert isinstance(caught.value.__cause__, ImportError)
    manager(require=["interlace-demo>=1,<2"])


def test_required_and_blocked_contradict(install):
    install("demo")
    with pytest.raises(PluginError, match=r"kept out by plugins.allow or plugins.block"):
        manager(require=["interlace-demo"], block=["interlace-demo"])


def test_two_managers_with_different_settings_coexist(install):
    install("demo")
    calls = []
    with_demo = manager(in_code(on_shutdown=lambda: calls.append("first")))
    without = manager(block=["interlace-demo"])
    assert "demo" in with_demo.registry("schedulers") and "demo" not in without.registry("schedulers")
    without.events.on_shutdown()
    assert not calls
    with_demo.events.on_shutdown()
    assert calls == ["first"]


def write_distribution(folder, metadata: str | None) -> None:
    info = folder / "interlace_odd-1.0.dist-info"
    info.mkdir()
    if metadata is not None:
        (info / "METADATA").write_text(metadata)
    (info / "entry_points.txt").write_text("[interlace]\nodd = interlace_odd\n")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("Metadata-Version: 2.1\nName: Interlace_Odd\nVersion: 1.0\n", ("Interlace_Odd", "1.0")),
        ("Metadata-Version: 2.1\r\nName: odd\r\nVersion: 1.0\r\n\r\nName: not this\r\n", ("odd", "1.0")),
        ("Name: odd\nVersion: 1.0\nName: again\n\nVersion: not this\n", ("odd", "1.0")),
        ("Metadata-Version: 2.1\n\nName: in the readme\n", ("interlace_odd", "")),
        (None, ("interlace_odd", "")),
    ],
)
def test_name_and_version_come_from_the_head_of_the_metadata(tmp_path, monkeypatch, metadata, expected):
    write_distribution(tmp_path, metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = load_settings({}, env={}).settings.plugins
    (found,) = [plugin for plugin in find_installed(settings) if plugin.entry_point.name == "odd"]
    assert (found.origin.package, found.origin.version) == expected


def test_what_discovery_found_can_be_given(install):
    install("demo", "broken")
    installed = [plugin for plugin in find_installed(load_settings({}, env={}).settings.plugins) if plugin.is_allowed]
    (demo,) = [plugin for plugin in installed if plugin.origin.package == "interlace-demo"]
    plugins = PluginManager(installed=[demo])
    assert "demo" in plugins.registry("schedulers") and "fcfs" not in plugins.registry("schedulers")
    assert not plugins.failures


def test_requirements_need_not_be_enforced():
    settings = load_settings({"plugins": {"require": ["interlace-none"]}}, env={}).settings
    plugins = PluginManager(settings, enforce=False)
    (error,) = plugins.unmet_requirements()
    assert isinstance(error, PluginNotFoundError) and "fcfs" in plugins.registry("schedulers")
