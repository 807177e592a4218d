"""`interlace plugins new`: which names it takes, what it refuses, and the form of what it writes.

That its packages install and pass their suites is tested in tests/e2e/test_scaffold.py.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib

import pytest

from interlace import cli
from interlace.contracts import CONTRACTS
from interlace.hookspecs import KINDS
from interlace.scaffold import ScaffoldError, check_name, distribution_of, render, write_package
from interlace.scaffold.examples import EXAMPLES

LONGEST = "a-name-of-forty-characters-and-not-more1"


def name_of(kind: str) -> str:
    return "TinyForCausalLM" if kind == "models" else "my-own"


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["plugins", "new", *arguments]) == 2
    return capsys.readouterr().err


def test_there_is_an_example_of_every_kind():
    assert set(EXAMPLES) == set(CONTRACTS) == set(KINDS)


@pytest.mark.parametrize("kind", CONTRACTS)
def test_files(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plugins", "new", kind, name_of(kind)]) == 0
    distribution = distribution_of(kind, name_of(kind))
    root, package = tmp_path / distribution, distribution.replace("-", "_")
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    module = CONTRACTS[kind].base.partition(":")[0].rpartition(".")[2]
    expected = {"pyproject.toml", "README.md", "tests/test_conformance.py"}
    expected |= {f"{package}/__init__.py", f"{package}/{module}.py"}
    assert files == expected | (set() if kind == "models" else {f"{package}/options.py"})
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["name"] == distribution
    assert project["project"]["entry-points"]["interlace"] == {package.removeprefix("interlace_"): package}
    out = capsys.readouterr().out
    assert f"interlace plugins show {kind}:{name_of(kind)}" in out and f"pytest {distribution}" in out


@pytest.mark.parametrize("kind", CONTRACTS)
def test_generated_code_is_clean(kind, tmp_path):
    """Formatted, linted by the rules of this project, and without a word of a stub; for short and long names."""
    longest = "TheLongestNameAModelMayHavexxForCausalLM" if kind == "models" else LONGEST
    assert len(longest) == 40
    for name in (name_of(kind), longest):
        root = tmp_path / name
        for path in write_package(kind, name, root):
            text = path.read_text("utf-8")
            assert "$" not in text.replace("$ ", ""), f"{path.name} has a place that was not filled"
            if path.suffix == ".py":
                tree = ast.parse(text)
                assert ast.get_docstring(tree), path
                assert not [word for word in ("TODO", "FIXME", "NotImplemented") if word in text]
        # The rules of this project, as they are for somebody else's package.
        rules = ["--isolated", "--no-cache", "--line-length", "120"]
        select = ["--select", "E,F,I,B,UP,ANN,RUF,SIM,C4,PIE", "--ignore", "ANN401,RUF012"]
        for command in (["check", *rules, *select], ["format", "--check", *rules]):
            done = subprocess.run([sys.executable, "-m", "ruff", *command, str(root)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", CONTRACTS)
def test_what_every_start_imports_is_light(kind):
    files = render(kind, name_of(kind))
    (init,) = [text for path, text in files.items() if path.endswith("/__init__.py")]
    imported = [node for node in ast.walk(ast.parse(init)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {node.module for node in imported if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "collections.abc", "interlace"} and len(imported) == 3
    assert f'api="{KINDS[kind]}"' in init, "a provider states the version it is written for"


def test_names(tmp_path):
    assert distribution_of("schedulers", "shortest_first") == "interlace-shortest-first"
    assert distribution_of("models", "TinyMoEForCausalLM") == "interlace-tiny-moe"
    assert distribution_of("models", "GPT2LMHeadModel") == "interlace-gpt2"
    files = render("schedulers", "shortest_first")
    assert 'name="shortest_first"' in files["interlace_shortest_first/__init__.py"]
    assert "class ShortestFirstScheduler(Scheduler):" in files["interlace_shortest_first/scheduler.py"]


@pytest.mark.parametrize(
    "name", ["", "My", "1st", "a b", "a--b", "-a", "a-", "../x", "a.b", "a/b", "ä", "a" * 41, "auto"]
)
def test_impossible_names(name):
    with pytest.raises(ScaffoldError, match=r"of a scheduler|name a scheduler"):
        check_name("schedulers", name)


@pytest.mark.parametrize("name", ["tiny", "Tiny", "ForCausalLM", "tinyForCausalLM", "Tiny-ForCausalLM", "BertModel"])
def test_impossible_names_of_models(name):
    with pytest.raises(ScaffoldError, match=r"cannot name a model architecture: .* such as TinyForCausalLM"):
        check_name("models", name)


def test_unknown_kind(capsys):
    error = refused(capsys, "scheduler", "mine")
    assert "no kind of plugin is called 'scheduler'. Did you mean 'schedulers'? Kinds: models, schedulers" in error


def test_name_that_is_taken(capsys, tmp_path):
    error = refused(capsys, "schedulers", "fcfs", "--directory", str(tmp_path / "new"))
    assert "the scheduler 'fcfs' exists: interlace " in error and "Choose another name" in error
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    error = refused(capsys, "schedulers", "mine", "--directory", str(tmp_path))
    assert "is not empty: nothing was written. Choose another: --directory D" in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    error = refused(capsys, "schedulers", "mine", "--directory", str(tmp_path / "mine.txt"))
    assert "is not empty" in error or "is a file" in error
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_empty_directory_will_do(tmp_path):
    (tmp_path / "new").mkdir()
    assert cli.main(["plugins", "new", "schedulers", "mine", "--directory", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "pyproject.toml").is_file()
