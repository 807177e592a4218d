"""docs/contracts.md says what the code says: kinds, versions, methods, processes; and the tests it names exist."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from interlace.contracts import CONTRACTS, load_target
from interlace.interfaces.scheduler import Outcome, Progress, RequestView, StepBuilder
from interlace.testing import SUITES

ASKS = {1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 16}
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.fixture(scope="module")
def page(repo_root) -> str:
    return (repo_root / "docs" / "contracts.md").read_text("utf-8")


def section(page: str, kind: str) -> str:
    return page.partition(f"\n## `{kind}`\n")[2].partition("\n## ")[0]


def first_column(text: str, head: str) -> set[str]:
    """Names in the first column of the table that begins with `head`."""
    table = text.partition(head + "\n")[2].partition("\n\n")[0]
    return set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines())))


def methods(base: type) -> set[str]:
    """Public methods and properties that the class itself defines."""
    members = {name: inspect.unwrap(getattr(member, "__func__", member)) for name, member in vars(base).items()}
    return {
        name
        for name, member in members.items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }


@pytest.mark.parametrize("kind", CONTRACTS)
def test_every_kind_has_its_version_and_every_method(page, kind):
    contract = CONTRACTS[kind]
    text = section(page, kind)
    assert text.lstrip().startswith(f"Version {contract.version}. "), f"section `{kind}` should begin with its version"
    base = load_target(contract.base, kind)
    assert first_column(text, "| method | called |") == methods(base)
    for heading in ("The core guarantees", "The plugin owes", "Threads and processes", "Cost", "Suite"):
        assert f"*{heading}*" in text, f"section `{kind}` lacks *{heading}*"


def test_what_a_scheduler_sees_is_complete(page):
    text = section(page, "schedulers")
    assert first_column(text, "| attribute | meaning |") == methods(RequestView)
    assert first_column(text, "| primitive | meaning |") == methods(StepBuilder)
    assert first_column(text, "| outcome of `schedule` | what a policy makes of it |") == set(Outcome.__members__)
    for name in methods(Progress):
        assert f"`{name}`" in text


@pytest.mark.parametrize("kind", CONTRACTS)
def test_every_kind_has_a_true_row_in_the_overview(page, kind):
    (row,) = re.findall(rf"^\| \[`{kind}`\]\(#{kind}\) \|.*$", page, re.MULTILINE)
    _, _, version, base, processes, selected, _ = (cell.strip() for cell in row.split("|"))
    contract = CONTRACTS[kind]
    assert (version, base) == (contract.version, f"`{contract.base.replace(':', '.')}`")
    assert processes == ", ".join(contract.processes)
    assert (f"`{contract.section}.use`" in selected) == (bool(contract.section) and contract.has_use)


def test_every_suite_is_told_with_its_kind(page):
    named = {suite for kind in CONTRACTS for suite in re.findall(r"\*Suite\*: `(\w+)`", section(page, kind))}
    assert named == set(SUITES)


def test_every_change_of_a_contract_is_told(page):
    for kind, contract in CONTRACTS.items():
        changes = re.search(r"Changes: ([^.]+)\.", section(page, kind))
        assert changes is not None and (changes.group(1) == "none yet") == (contract.version == "1")
        for adapter in contract.adapters.values():
            assert adapter.change in section(page, kind) and adapter.until in section(page, kind)


def test_every_ask_names_tests_that_exist(page, repo_root):
    rows = {int(number): row for number, row in re.findall(r"^\| (\d+) \|(.*)$", page, re.MULTILINE)}
    assert set(rows) == ASKS
    for number, row in rows.items():
        named = TEST.findall(row)
        assert named, f"ask {number} names no test"
        for path, name in named:
            assert name in names_in(repo_root / path), f"ask {number}: there is no {path}::{name}"


def names_in(path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
