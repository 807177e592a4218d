"""The source as the architecture tests see it: parsed, never imported."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGES = {"core": "interlace", "plugins": "interlace.plugins"}


@dataclass(frozen=True)
class Import:
    """One imported module or name. `name` is absolute: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""

    name: str
    line: int
    lazy: bool
    """Inside a function: runs later, so it can neither close a cycle nor slow the start."""
    typing_only: bool
    """Under `if TYPE_CHECKING`: never runs."""


@dataclass(frozen=True)
class Source:
    """One Python file under the name it is imported by."""

    module: str
    path: str
    text: str = field(repr=False)
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, False, False))

    def at(self, line: int) -> str:
        return f"{self.path}:{line}"

    def _imports(self, node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy, typing_only) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                origin = self._origin(child)
                yield from (Import(f"{origin}.{alias.name}", child.lineno, lazy, typing_only) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from self._imports(ast.Module([statement], []), lazy, True)
                for statement in child.orelse:
                    yield from self._imports(ast.Module([statement], []), lazy, typing_only)
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from self._imports(child, lazy or function, typing_only)

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.module.split(".") + (["__init__"] if self.is_package else [])
        return ".".join(parts[: -node.level] + ([node.module] if node.module else []))


def _read(root: Path, folder: str, package: str) -> Iterator[Source]:
    for path in sorted((root / folder).rglob("*.py")):
        parts = list(path.relative_to(root / folder).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        parts = parts[:-1] if is_package else parts
        module = ".".join([package, *parts])
        yield Source(module, path.relative_to(root).as_posix(), path.read_text("utf-8"), is_package)


@pytest.fixture(scope="session")
def core(repo_root: Path) -> list[Source]:
    return list(_read(repo_root, "core", "interlace"))


@pytest.fixture(scope="session")
def plugins(repo_root: Path) -> list[Source]:
    return list(_read(repo_root, "plugins", "interlace.plugins"))


@pytest.fixture(scope="session")
def tests(repo_root: Path) -> list[Source]:
    return list(_read(repo_root, "tests", "tests"))


@pytest.fixture(scope="session")
def make_source() -> Callable[..., Source]:
    """A source file that exists only in the test: what shows that a rule catches its violation."""

    def make(text: str, module: str = "interlace.example", is_package: bool = False) -> Source:
        return Source(module, f"{module.replace('.', '/')}.py", text, is_package)

    return make


@pytest.fixture(scope="session")
def report() -> Callable[[Iterable[str]], None]:
    """Fail with every violation on its own line."""

    def check(violations: Iterable[str]) -> None:
        found = list(violations)
        assert not found, "\n" + "\n".join(found)

    return check
