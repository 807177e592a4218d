"""`write_package`: a complete plugin package of any kind, from the templates beside this file.

What it writes installs, works and passes its conformance test; the author then changes what it does.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from interlace import __version__
from interlace.contracts import CONTRACTS
from interlace.errors import InterlaceError, did_you_mean
from interlace.scaffold.examples import EXAMPLES

_RESERVED = ("auto", "reference")
_MAX_LENGTH = 40


class ScaffoldError(InterlaceError):
    """No package can be written as asked."""


def write_package(kind: str, name: str, directory: Path | None = None) -> list[Path]:
    """Write the package of a new plugin into `directory` (default: interlace-NAME) and return its files.

    Raises `ScaffoldError` if kind or name are not possible, or if the directory holds anything already."""
    check_name(kind, name)
    root = directory or Path(distribution_of(kind, name))
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ScaffoldError(f"'{root}' exists and is not empty: nothing was written. Choose another: --directory D")
    written = []
    for relative, text in render(kind, name).items():
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        written.append(path)
    return written


def render(kind: str, name: str) -> dict[str, str]:
    """Path within the package → text of the file, of a kind and name that `check_name` accepts."""
    values = _values(kind, name)
    package, module = values["package"], values["module"]
    folder = files("interlace.scaffold") / "templates"
    own_test = f"{kind}.test.py"
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{package}/__init__.py": "init.py",
        f"{package}/{module}.py": f"{kind}.py",
        "tests/test_conformance.py": own_test if (folder / f"{own_test}.tmpl").is_file() else "test.py",
    }
    if kind != "models":  # whose numbers come from the checkpoint
        templates[f"{package}/options.py"] = f"{kind}.options.py"
    return {
        path: Template((folder / f"{template}.tmpl").read_text("utf-8")).substitute(values)
        for path, template in templates.items()
    }


def check_name(kind: str, name: str) -> None:
    """Raise `ScaffoldError` for a kind that does not exist, or a name that nothing could select."""
    if kind not in CONTRACTS:
        raise ScaffoldError(
            f"no kind of plugin is called '{kind}'.{did_you_mean(kind, CONTRACTS)} Kinds: {', '.join(CONTRACTS)}"
        )
    noun = CONTRACTS[kind].noun
    if len(name) > _MAX_LENGTH:
        raise ScaffoldError(f"'{name}' is too long for the name of a {noun}: at most {_MAX_LENGTH} characters")
    if kind == "models":
        if not re.fullmatch(r"[A-Z][A-Za-z0-9]*(ForCausalLM|LMHeadModel)", name):
            raise ScaffoldError(
                f"'{name}' cannot name a {noun}: a checkpoint's config.json selects it by its architecture string, "
                "such as TinyForCausalLM; it ends in ForCausalLM or LMHeadModel"
            )
    elif not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name):
        raise ScaffoldError(
            f"'{name}' cannot name a {noun}: use small letters and digits, with single - or _ between them, beginning "
            "with a letter, such as shortest-first"
        )
    elif name in _RESERVED:
        raise ScaffoldError(f"'{name}' cannot name a {noun}: it means something else in the configuration")


def distribution_of(kind: str, name: str) -> str:
    """What pip calls the package: `shortest_first` → interlace-shortest-first, TinyForCausalLM → interlace-tiny."""
    if kind == "models":
        name = re.sub(r"(ForCausalLM|LMHeadModel)$", "", name)
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "-", name).lower()
    return f"interlace-{name.replace('_', '-')}"


def _values(kind: str, name: str) -> dict[str, str]:
    """What the templates are filled with."""
    contract, example = CONTRACTS[kind], EXAMPLES[kind]
    module = contract.base.partition(":")[0].rpartition(".")[2]  # as in interlace.interfaces
    part = _camel(module)
    distribution = distribution_of(kind, name)
    package = distribution.replace("-", "_")
    class_name = name if kind == "models" else _camel(name) + part
    options = "" if kind == "models" else f'        options="{package}.options:Options",\n'
    options_row = "" if kind == "models" else f"| `{package}/options.py` | its options, importable without torch |\n"
    values = {
        "kind": kind,
        "name": name,
        "noun": contract.noun,
        "module": module,
        "part": part,
        "api": contract.version,
        "version": __version__,
        "distribution": distribution,
        "package": package,
        "entry_point": package.removeprefix("interlace_"),
        "class_name": class_name,
        "summary": example.summary,
        "about": example.about,
        "provider_options": options,
        "options_row": options_row,
    }
    return values | {"select": Template(example.select).substitute(values).rstrip()}


def _camel(name: str) -> str:
    """`shortest-first` → ShortestFirst."""
    return "".join(word.capitalize() for word in re.split("[_-]", name))
