"""Size is kept small by a machine: lines per file, per function, per model family."""

from __future__ import annotations

import ast
from collections.abc import Iterator

MAX_FILE = 400
MAX_FUNCTION = 60
MAX_MODEL = 150

EXEMPT: dict[str, str] = {}
"""Path, or path:function, that may exceed its budget → why it must. Keep it short."""


def too_long(sources) -> Iterator[tuple[str, str]]:
    """(what exceeds its budget, message) of files and functions; docstrings and blanks count."""
    for source in sources:
        model = source.module.startswith("interlace.plugins.models.")
        budget = MAX_MODEL if model else MAX_FILE
        lines = source.text.count("\n")
        if lines > budget:
            yield source.path, f"{source.path}: {lines} lines, the budget is {budget}"
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    name = f"{source.path}:{node.name}"
                    yield (
                        name,
                        f"{source.at(node.lineno)}: {node.name} has {length} lines, budget {MAX_FUNCTION}",
                    )


def test_budgets(core, plugins, tests, report):
    report(message for name, message in too_long([*core, *plugins, *tests]) if name not in EXEMPT)


def test_exemptions_are_needed(core, plugins, tests):
    assert set(EXEMPT) <= {name for name, _ in too_long([*core, *plugins, *tests])}, "an exemption is out of date"


def test_budgets_catch_what_is_too_long(make_source):
    function = "def grown():\n" + "    pass\n" * 60
    assert [name for name, _ in too_long([make_source(function)])] == ["interlace/example.py:grown"]
    assert not list(too_long([make_source("def fits():\n" + "    pass\n" * 59)]))
    assert [name for name, _ in too_long([make_source("x = 1\n" * 401)])] == ["interlace/example.py"]
    assert not list(too_long([make_source("x = 1\n" * 151)]))
    assert list(too_long([make_source("x = 1\n" * 151, "interlace.plugins.models.example")]))
