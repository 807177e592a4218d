"""The five plugin errors, with their texts."""

from __future__ import annotations

import pytest

from interlace import __version__
from interlace.config import load_settings
from interlace.errors import (
    PluginConflictError,
    PluginContractError,
    PluginImportError,
    PluginNotFoundError,
    PluginOptionsError,
)
from interlace.options import check_options, validate_options
from interlace.plugin_manager import PluginManager
from interlace.spec import Component


@pytest.fixture
def schedulers(install):
    """The registry with some of the fake distributions installed."""

    def make(*names: str, **plugins):
        install(*names)
        return PluginManager(load_settings({"plugins": plugins}, env={}).settings).registry("schedulers")

    return make


def test_not_found_names_kind_nearest_all_packages_and_failures(schedulers):
    registry = schedulers("demo", "broken", "blocked", block=["interlace-blocked"])
    with pytest.raises(PluginNotFoundError) as caught:
        registry.get("dmeo", "scheduler.use, command line")
    message = str(caught.value)
    assert message.startswith("no scheduler is called 'dmeo' (scheduler.use, command line). Did you mean 'demo'?")
    assert "Installed schedulers: demo (interlace-demo 1.2), fcfs (interlace 0" in message
    assert "Plugins that failed to load: 'broken' of interlace-broken 0.1 (ImportError: libfast.so.3" in message
    assert "kept out by plugins.allow or plugins.block: interlace-blocked 9.0" in message
    assert message.endswith("Cure: choose one of these, or install the package that provides 'dmeo' (pip install …).")
    assert isinstance(caught.value.__cause__, ImportError)


def test_conflict_names_both_owners_and_the_way_out(schedulers):
    registry = schedulers("demo", "rival")
    with pytest.raises(PluginConflictError) as caught:
        registry.get("twin")
    message = str(caught.value)
    assert "'twin' is provided by interlace-demo 1.2 (entry point 'demo') and interlace-rival 0.3 (entry" in message
    assert "scheduler.use = 'interlace-demo:twin' or scheduler.use = 'interlace-rival:twin'" in message
    assert "plugins.block = ['interlace-rival']" in message
    assert registry.get("interlace-rival:twin").load().__name__ == "Twin"
    assert registry.get("interlace-demo:twin").load().__name__ == "Demo"
    assert "interlace-rival:twin" in registry and registry.names().count("twin") == 1


def test_blocking_one_owner_ends_a_conflict(schedulers):
    assert schedulers("demo", "rival", block=["interlace-demo"]).get("twin").origin.package == "interlace-rival"


@pytest.mark.parametrize(
    ("name", "cause", "expected"),
    [
        ("unimportable", ModuleNotFoundError, "cannot be imported from 'interlace_demo_missing:Scheduler': ModuleNot"),
        ("nameless", AttributeError, "'interlace_demo_schedulers:NoSuchClass': AttributeError"),
    ],
)
def test_import_error_chains_its_cause(schedulers, name, cause, expected):
    offer = schedulers("demo").get(name)
    with pytest.raises(PluginImportError) as caught:
        offer.load()
    assert str(caught.value).startswith(f"scheduler '{name}' (interlace-demo 1.2) cannot be imported")
    assert expected in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)


def test_import_error_explains_main():
    with pytest.raises(PluginImportError, match=r"exists in that process only.*engine.process = 'inline'"):
        Component(kind="schedulers", name="mine", target="__main__:NotThere").load()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "incomplete",
            "lacks plan of interlace.interfaces.scheduler.Scheduler (contract version 1): write it in class",
        ),
        ("foreign", "which is not a subclass of interlace.interfaces.scheduler.Scheduler"),
    ],
)
def test_contract_error_names_what_is_missing(schedulers, name, expected):
    with pytest.raises(PluginContractError) as caught:
        schedulers("demo").get(name).load()
    assert str(caught.value).startswith(f"scheduler '{name}' (interlace-demo 1.2) ")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "old",
            "scheduler 'old' (interlace-demo 1.2) is written for version 0 of the schedulers contract; this Interlace, "
            f"{__version__}, speaks 1: it is too old. Upgrade interlace-demo, or install an older interlace",
        ),
        ("new", "speaks 1: it is too new. Upgrade interlace, or install an older interlace-demo"),
        ("odd", "for version '1.5' of the schedulers contract; this Interlace"),
        ("odd", "Provider.api should be a whole number as text. Upgrade interlace-demo; its authors should write api="),
        ("undeclared", "does not say which version of the schedulers contract it is written for; this Interlace"),
        ("undeclared", "Upgrade interlace-demo; its authors should state the one they wrote it for: Provider(..."),
    ],
)
def test_contract_error_names_both_versions_and_the_cure(schedulers, name, expected):
    with pytest.raises(PluginContractError) as caught:
        schedulers("demo").get(name)
    assert expected in str(caught.value)


def options_of(schedulers, options, cli=None, name="demo"):
    loaded = load_settings({"scheduler": {"options": options}}, cli, env={})
    registry = schedulers("demo")
    return validate_options(loaded, registry.get(name), name)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"windw": 3},
            "scheduler.options.demo.windw (constructor): unknown option of scheduler 'demo' (interlace-demo 1.2). "
            "Did you mean 'scheduler.options.demo.window'? Options: window, tenants, log, token, weights.gold.",
        ),
        (
            {"window": 65},
            "scheduler.options.demo.window = '65' (constructor): input should be less than or equal to 64, says "
            "scheduler 'demo' (interlace-demo 1.2). Allowed: integer, at least 1, at most 64.",
        ),
        ({"weights": {"gld": 1}}, "Did you mean 'scheduler.options.demo.weights.gold'?"),
        (
            {"weights": {"gold": -1}},
            "scheduler.options.demo.weights.gold = '-1' (constructor): input should be greater",
        ),
    ],
)
def test_options_error_names_path_reason_and_nearest(schedulers, options, expected):
    with pytest.raises(PluginOptionsError) as caught:
        options_of(schedulers, {"demo": options})
    assert expected in str(caught.value)


def test_options_error_hides_secrets(schedulers):
    with pytest.raises(PluginOptionsError) as caught:
        options_of(schedulers, {"demo": {"token": ["hunter2"]}})
    assert "hunter2" not in str(caught.value) and caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_options_that_are_no_model(schedulers):
    with pytest.raises(PluginContractError, match=r"Options of scheduler 'untyped' .* is not a pydantic model"):
        options_of(schedulers, {"untyped": {"a": 1}}, name="untyped")


def test_valid_options_are_complete_plain_data(schedulers):
    texts = {
        "scheduler.options.demo.window": "9",
        "scheduler.options.demo.tenants": "a,b",
        "scheduler.options.demo.log": "/tmp/x",
        "scheduler.options.demo.weights.gold": "3",
        "scheduler.options.demo.token": "t",
    }
    options = options_of(schedulers, {}, texts)
    assert options == {"window": 9, "tenants": ["a", "b"], "log": "/tmp/x", "token": "t", "weights": {"gold": 3.0}}
    assert all(type(value) in (int, list, str, dict) for value in options.values())
    assert options_of(schedulers, {})["window"] == 8


def test_options_under_the_qualified_name(schedulers):
    assert options_of(schedulers, {"interlace-demo:demo": {"window": 5}}, name="interlace-demo:demo")["window"] == 5


def test_options_of_what_nobody_offers(schedulers):
    loaded = load_settings(cli={"scheduler.options.dmo.window": "1"}, env={})
    with pytest.raises(PluginOptionsError, match=r"scheduler.options.dmo .command line.: no scheduler is called 'dmo'"):
        check_options(loaded, schedulers("demo"))


def test_options_of_unselected_plugins_are_checked(schedulers):
    registry = schedulers("demo")
    with pytest.raises(PluginOptionsError, match=r"'scheduler.options.demo.window'"):
        check_options(load_settings(cli={"scheduler.options.demo.windw": "1"}, env={}), registry)
    # A plugin that is broken is loud only once it is selected.
    check_options(load_settings(cli={"scheduler.options.unimportable.x": "1"}, env={}), registry)
