"""State, time and the environment enter through one door each.

Module-level state. Two engines live in one process, so nothing that changes may live in a module. A static check cannot
prove immutability; this one is strict where it matters and simple enough to trust. At module level

1. a name bound to a list, dict or set (display, comprehension, or constructor) must be a constant: UPPER_CASE, or
   annotated as `Final`, `Mapping`, `Sequence` or another read-only type (`__all__` and other dunder names are fine);
2. an instance of a class may be bound only if its type cannot change after it is made (`IMMUTABLE` below), because
   everything else is an object with a life: make it in `assemble.py` and pass it on;
3. and no code of the module may write to its module-level names: no `global`, no item or attribute assignment or
   deletion, no augmented assignment in a function, no call of a mutating method (`append`, `update`, …).
Functions kept by `functools.cache` and `lru_cache` are state too, unless exempted with a reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

MUTABLE = {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque", "local", "count"}
IMMUTABLE = {
    # typing and pluggy markers, compiled patterns and codecs, frozen values
    *("TypeVar", "ParamSpec", "NewType", "TypeAliasType", "HookspecMarker", "HookimplMarker", "ConfigDict"),
    *("Path", "PurePath", "MappingProxyType", "Struct", "Encoder", "Decoder", "TypeAdapter", "Fraction", "Decimal"),
}
READ_ONLY = ("Final", "Mapping", "Sequence", "Collection", "frozenset", "tuple", "AbstractSet")
WRITES = {"append", "extend", "insert", "remove", "pop", "clear", "update", "setdefault", "popitem", "add", "discard"}
WRITES |= {"appendleft", "popleft", "sort", "reverse", "difference_update", "intersection_update", "subtract"}

EXEMPT_STATE: dict[str, str] = {}
"""path:name of module-level state → why it is harmless to two engines in one process."""

TIME = {"time", "monotonic", "perf_counter", "process_time", "thread_time", "sleep"}
TIME |= {f"{name}_ns" for name in TIME}
EXEMPT_TIME = {"core/clock.py": "it is the clock"}
"""Files of core/ that may use `time` directly → why."""

ENVIRONMENT = ("core/config.py", "core/config/")
"""The one place that reads the environment."""
ENVIRONMENT_NAMES = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")


def called(node: ast.AST | None) -> str:
    """Last part of the name of what `node` calls: `Path` for `pathlib.Path(…)`; empty if it is no call."""
    if not isinstance(node, ast.Call):
        return ""
    function = node.func.value if isinstance(node.func, ast.Subscript) else node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def top_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those inside if, try, with and for included."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from top_statements(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from top_statements(handler.body)


def bindings(tree: ast.Module) -> Iterator[tuple[str, ast.expr, str, int]]:
    """(name, value, annotation, line) of every name bound to a value at module level."""
    for statement in top_statements(tree.body):
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                yield from ((n.id, statement.value, "", n.lineno) for n in names if isinstance(n, ast.Name))
        elif isinstance(statement, ast.AnnAssign) and statement.value and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement.value, ast.unparse(statement.annotation), statement.lineno


def mutable_bindings(source) -> Iterator[tuple[str, int, str]]:
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for name, value, annotation, line in bindings(source.tree):
        if name.startswith("__") and name.endswith("__"):
            continue
        container = isinstance(value, displays) or called(value) in MUTABLE
        constant = name.isupper() or annotation.partition("[")[0].rpartition(".")[2] in READ_ONLY
        if container and not constant:
            yield name, line, "is a mutable container: make it an UPPER_CASE constant or pass it along"
        elif not container and called(value).lstrip("_")[:1].isupper() and called(value) not in IMMUTABLE:
            yield name, line, f"is an object of type {called(value)}: make it in assemble.py and pass it along"


def root_name(node: ast.AST) -> str:
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def writes(source) -> Iterator[tuple[str, int, str]]:
    """Places that write to a module-level name. Names bound again inside a function are that function's own."""
    tree = source.tree
    names = {name for name, _, _, _ in bindings(tree)}

    def visit(node: ast.AST, own: frozenset[str]) -> Iterator[tuple[str, int, str]]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            own |= {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
            own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        elif isinstance(node, ast.Global):
            yield node.names[0], node.lineno, "is written through `global`"
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        for target in targets:
            if isinstance(target, (ast.Subscript, ast.Attribute)) and root_name(target) in names - own:
                yield root_name(target), target.lineno, "is changed after it was made"
        method = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if method and method.attr in WRITES and isinstance(method.value, ast.Name) and method.value.id in names - own:
            yield method.value.id, node.lineno, f"is changed by .{method.attr}()"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, own)

    yield from visit(tree, frozenset())


def caches(source) -> Iterator[tuple[str, int, str]]:
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            decorators = {ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in node.decorator_list}
            if decorators & {"cache", "lru_cache"}:
                yield node.name, node.lineno, "keeps results for the life of the process"


def module_state(source) -> Iterator[str]:
    for name, line, reason in (*mutable_bindings(source), *writes(source), *caches(source)):
        if f"{source.path}:{name}" not in EXEMPT_STATE:
            yield f"{source.at(line)}: module-level '{name}' {reason}"


def reads_time(source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in TIME and root_name(node) == "time":
            yield f"{source.at(node.lineno)}: time.{node.attr}: core takes time from its Clock"
    for found in source.imports:
        if found.name.partition(".")[0] == "time" and found.name.partition(".")[2] in TIME:
            yield f"{source.at(found.line)}: {found.name}: core takes time from its Clock"


def reads_environment(source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ENVIRONMENT_NAMES:
            yield f"{source.at(node.lineno)}: {ast.unparse(node)}: the environment is read in interlace.config only"
    for found in source.imports:
        if found.name in ENVIRONMENT_NAMES:
            yield f"{source.at(found.line)}: {found.name}: the environment is read in interlace.config only"


def test_no_mutable_state_in_modules(core, plugins, report):
    report(line for source in [*core, *plugins] for line in module_state(source))


def test_core_reads_time_through_its_clock(core, report):
    report(line for source in core if source.path not in EXEMPT_TIME for line in reads_time(source))


def test_environment_is_read_in_one_place(core, plugins, report):
    others = [source for source in [*core, *plugins] if not source.path.startswith(ENVIRONMENT)]
    report(line for source in others for line in reads_environment(source))


def test_rules_catch_mutable_state(make_source):
    for text in (
        "registry = {}",
        "_seen: list[str] = []",
        "if True:\n    pending = collections.deque()",
        "NAMES = []\nNAMES.append('x')",
        "TABLE = {}\ndef put(key):\n    TABLE[key] = 1",
        "ROWS = ()\ndef put():\n    global ROWS\n    ROWS = (1,)",
        "TABLE = {}\ndef drop(key):\n    del TABLE[key]",
        "_manager = PluginManager()",
        "LOCK = threading.Lock()",
        "@functools.lru_cache(maxsize=1)\ndef load():\n    return 1",
    ):
        assert len(list(module_state(make_source(text)))) == 1, text


def test_rules_leave_constants_alone(make_source):
    for text in (
        "__all__ = ['a']\nLIMIT = 3\nNAMES = {'a': 1}\npattern = re.compile('x')\nT = TypeVar('T')",
        "table: Mapping[str, int] = {'a': 1}\nlogger = logging.getLogger(__name__)\nPAIR = (1, 2)",
        "class Thing:\n    def __init__(self):\n        self.items = []\n        self.items.append(1)",
        "NAMES = ['a']\ndef f():\n    NAMES = []\n    NAMES.append(1)\n    for name in NAMES:\n        print(name)",
    ):
        assert not list(module_state(make_source(text))), text


def test_rules_catch_time_and_environment(make_source):
    assert len(list(reads_time(make_source("import time\nx = time.monotonic()\ntime.sleep(1)")))) == 2
    assert len(list(reads_time(make_source("from time import perf_counter as now")))) == 1
    assert not list(reads_time(make_source("def f(clock, output):\n    return clock.now() + output.time")))
    assert len(list(reads_environment(make_source("import os\nos.environ['A']\nos.getenv('B')")))) == 2
    assert len(list(reads_environment(make_source("from os import environ")))) == 1
