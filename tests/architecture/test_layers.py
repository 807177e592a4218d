"""Who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

PUBLIC_NAMES = {"LLM", "AsyncLLM", "Provider", "RequestOutput", "SamplingParams", "__version__", "hookimpl"}
PUBLIC_MODULES = (
    "interlace.messages",
    "interlace.request",
    "interlace.interfaces",
    "interlace.hookspecs",
    "interlace.kv",
    "interlace.layers",
    "interlace.errors",
    "interlace.testing",
    "interlace.model_config",
    "interlace.tokenizer",
    "interlace.sampling.params",
    # Types named in the signatures of the contracts:
    "interlace.spec",  # Executor.start
    "interlace.worker.batch",  # AttentionBackend.prepare
    "interlace.sampling.distribution",  # Kernels.draw
    "interlace.sampling.device",  # Kernels.sample
)
KIND_MODULES = {
    # An executor exists to place workers and to time their steps.
    "executors": ("interlace.worker", "interlace.clock", "interlace.remote_error"),
    # One compiled library serves both kinds, and one package of Triton kernels; they are no kinds themselves.
    "attention": ("interlace.plugins.native", "interlace.plugins.triton"),
    "kernels": ("interlace.plugins.native", "interlace.plugins.triton"),
}


def inside(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def core_imports_plugins(sources) -> Iterator[str]:
    for source in sources:
        for found in source.imports:
            if inside(found.name, ["interlace.plugins"]):
                yield f"{source.at(found.line)}: core must not import {found.name}"
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or " " in node.value:
                continue
            if inside(node.value.partition(":")[0], ["interlace.plugins"]):
                yield f"{source.at(node.lineno)}: core must not name {node.value!r}: plugins are found by discovery"


def kind_of(module: str) -> str:
    return module.removeprefix("interlace.plugins").lstrip(".").partition(".")[0]


def plugin_imports(sources) -> Iterator[str]:
    for source in sources:
        kind = kind_of(source.module)
        allowed = (*PUBLIC_MODULES, *KIND_MODULES.get(kind, ()), f"interlace.plugins.{kind}")
        for found in source.imports:
            if not inside(found.name, ["interlace"]) or found.name.removeprefix("interlace.") in PUBLIC_NAMES:
                continue
            if inside(found.name, allowed):
                continue
            if inside(found.name, ["interlace.plugins"]):
                yield f"{source.at(found.line)}: kind '{kind}' must not import {found.name}"
            else:
                yield f"{source.at(found.line)}: plugins may import public modules only, not {found.name}"


def bare_imports(sources) -> Iterator[str]:
    for source in sources:
        for found in source.imports:
            if inside(found.name, ["core", "plugins"]):
                yield f"{source.at(found.line)}: '{found.name}' is called interlace.…"


def cycle(sources) -> list[str] | None:
    """A cycle among imports that run when a module is imported, or None.

    `from package import name` depends on the submodule of that name if there is one, else on the package. That a
    submodule's import runs its package first is left out: it is harmless while `__init__` imports none of its own.
    """
    modules = {source.module for source in sources}
    graph: dict[str, set[str]] = {}
    for source in sources:
        edges = graph.setdefault(source.module, set())
        for found in source.imports:
            if found.lazy or found.typing_only:
                continue
            target = found.name if found.name in modules else found.name.rpartition(".")[0]
            if target in modules and target != source.module:
                edges.add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_core_never_imports_plugins(core, report):
    report(core_imports_plugins(core))


def test_plugins_import_public_api_only(plugins, report):
    report(plugin_imports(plugins))


def test_nobody_imports_the_bare_folders(core, plugins, tests, report):
    report(bare_imports([*core, *plugins, *tests]))


def test_no_import_cycles(core, plugins):
    assert cycle(core) is None
    assert cycle(plugins) is None


def test_rules_catch_a_core_that_knows_plugins(make_source):
    for text in (
        "import interlace.plugins.models",
        "from interlace import plugins",
        "from interlace.plugins.models import llama",
        "def late():\n    from .plugins import models",
        "import importlib\nimportlib.import_module('interlace.plugins.models.llama')",
        "TARGET = 'interlace.plugins.models.llama:Llama'",
    ):
        assert len(list(core_imports_plugins([make_source(text, "interlace.example")]))) == 1, text
    assert not list(core_imports_plugins([make_source("import interlace.kv.specs")]))


def test_rules_catch_a_plugin_that_reaches_inside(make_source):
    def violations(text: str) -> int:
        return len(list(plugin_imports([make_source(text, "interlace.plugins.schedulers.example")])))

    assert violations("from interlace.scheduling.step_builder import StepBuilder") == 1
    assert violations("from interlace import assemble") == 1
    assert violations("if TYPE_CHECKING:\n    from interlace.engine import core") == 1
    assert violations("from interlace.plugins.models import llama") == 1
    assert violations("from ..models import llama") == 1
    assert violations("from interlace.worker.model_runner import ModelRunner") == 1
    assert violations("import torch\nfrom interlace import hookimpl\nfrom . import fcfs") == 0
    assert violations("from interlace.interfaces.scheduler import Scheduler\nfrom interlace.kv import specs") == 0


def test_rules_catch_bare_imports(make_source):
    assert (
        len(list(bare_imports([make_source("import core\nfrom plugins.models import llama\nimport interlace")]))) == 2
    )


def test_rules_catch_a_cycle(make_source):
    def package(a: str, b: str, c: str) -> list:
        texts = {"interlace.a": a, "interlace.b": b, "interlace.b.c": c}
        return [make_source(text, module, module == "interlace.b") for module, text in texts.items()]

    closed = cycle(package("from interlace.b import c", "", "import interlace.a"))
    assert closed is not None and {"interlace.a", "interlace.b.c"} == set(closed)
    assert cycle(package("", "from .c import name", "from interlace.b import other")) is not None
    assert cycle(package("from interlace.b import c", "", "def f():\n    import interlace.a")) is None
    assert cycle(package("from interlace.b import c", "", "if TYPE_CHECKING:\n    import interlace.a")) is None
