"""Conformance suite for checkpoint formats. A third party subclasses it:

    class TestMine(CheckpointConformance):
        checkpoint = "mine"

        def write(self, folder):
            ...                     # a small valid checkpoint of any installed architecture
            return folder           # what a user would give as the model: the folder, or a file in it

The checkpoint is read whole, compared with itself, loaded into its model, and then damaged in every way a download or
a disk can: a damaged file is a `CheckpointError` that names it, or is read all the same; never another exception, a
hang or a huge allocation.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from interlace.errors import CheckpointError
from interlace.interfaces.checkpoint import Checkpoint
from interlace.interfaces.model import Model
from interlace.interfaces.weights import BlockWeight
from interlace.model_config import ModelConfig
from interlace.testing.conformance import Conformance, find_offer, find_provider, skip
from interlace.testing.model_harness import ModelHarness
from interlace.testing.time_limit import OutOfTimeError, time_limit

_LIGHT = """
import importlib, json, sys
path, module, name, options, model = json.loads(sys.argv[1])
sys.path[:] = path
target = importlib.import_module(module)
for part in name.split("."):
    target = getattr(target, part)
importing = "torch" in sys.modules
from pathlib import Path
checkpoint = target(target.Options(**options), Path(model))
checkpoint.raw_config(), checkpoint.tokenizer()
print(json.dumps([importing, "torch" in sys.modules]))
"""


_ABSURD = (b"-1", b"0", b"7", b"1e9", b"0.5", b"99999999999", b"1e999", b"null", b"true", b'"x"', b"[]", b"{}")


class Reading(NamedTuple):
    """All a checkpoint holds, in a form that compares."""

    config: dict[str, Any]
    tokens: list[int]
    weights: list[tuple[str, str, tuple[int, ...], int]]
    """(name, dtype or block format, shape, checksum) in file order."""
    num_weights: int | None


class CheckpointConformance(Conformance):
    """What every checkpoint format must do."""

    kind = "checkpoints"
    selector = "checkpoint"
    checkpoint: ClassVar[str | type[Checkpoint]]
    model: ClassVar[str | type[Model] | None] = None
    """The model of the checkpoint's architecture; None: the installed one."""
    is_found: ClassVar[bool] = True
    """False for formats that never recognise a path and must be selected by `checkpoint.use`."""
    text: ClassVar[str] = "some text 12"
    """What the tokenizer gives back as it was."""
    time_limit_s: ClassVar[float] = 20.0
    """Longest that reading a damaged checkpoint may take."""
    memory_limit: ClassVar[int] = 2 << 30
    """Most bytes that reading a damaged checkpoint may take."""
    seeds = range(40)

    def write(self, folder: Path) -> Path:
        """Write a small valid checkpoint into the empty `folder`; returns the path of the model. Every call writes
        the same. Keep it below a megabyte: it is damaged and read many times."""
        raise NotImplementedError(f"write a method `write(self, folder)` in {type(self).__name__}")

    # ── Valid checkpoints ───────────────────────────────────────────────────────────────────────────────────────

    def test_importable_without_torch(self, tmp_path: Path) -> None:
        """The front reads configuration and tokenizer, and must not wait for torch."""
        if not isinstance(self.checkpoint, str):
            skip("imported by name only: install the package, and name the provider instead of giving its class")
        module, name = self.target.__module__, self.target.__qualname__
        given = json.dumps([sys.path, module, name, dict(self.options), str(self.write(tmp_path))])
        done = subprocess.run([sys.executable, "-c", _LIGHT, given], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"config and tokenizer cannot be read in a fresh process:\n{done.stderr}"
        importing, reading = json.loads(done.stdout)
        assert not importing, f"importing {module} imports torch; do so inside `weights`"
        assert not reading, "reading configuration and tokenizer imports torch"

    def test_matches_its_own(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        found = self.target.matches(path)
        assert found is self.is_found, f"matches says {found!r} for {sorted(file.name for file in _files(tmp_path))}"

    def test_does_not_match_others(self, tmp_path: Path) -> None:
        """Formats are asked in turn; one that takes everything hides those after it."""
        empty, notes = tmp_path / "empty", tmp_path / "notes"
        empty.mkdir()
        notes.mkdir()
        (notes / "README.md").write_text("not a model", "utf-8")
        (notes / "settings.json").write_text("{}", "utf-8")
        (tmp_path / "nothing").write_bytes(b"")
        (tmp_path / "noise.bin").write_bytes(random.Random(0).randbytes(4000))
        for path in (empty, notes, notes / "README.md", tmp_path / "nothing", tmp_path / "noise.bin"):
            assert self.target.matches(path) is False, f"matches takes {path.relative_to(tmp_path)} for its own"

    def test_reads_the_same_twice(self, tmp_path: Path) -> None:
        """The same object again, another object, and after one that was left half read."""
        path = self.write(tmp_path)
        opened = self._open(path)
        first, again, other = self._read(opened), self._read(opened), self._read(self._open(path))
        next(iter(opened.weights()), None)
        for what, reading in {"again": again, "anew": other, "after a half": self._read(opened)}.items():
            for part, value, expected in zip(Reading._fields, reading, first, strict=True):
                assert value == expected, f"{part} differ when the checkpoint is read {what}"

    def test_weights_are_well_formed(self, tmp_path: Path) -> None:
        opened = self._open(self.write(tmp_path))
        names = []
        for name, tensor in opened.weights():
            kinds = (torch.Tensor, BlockWeight)
            assert isinstance(name, str) and isinstance(tensor, kinds), f"{name!r} comes with {type(tensor)}"
            device = tensor.data.device
            assert device.type == "cpu", f"{name} is on {device}; workers move it"
            names.append(name)
        assert len(set(names)) == len(names), "a tensor comes twice"
        count = opened.num_weights()
        assert count is None or count == len(names), f"num_weights is {count}, weights yields {len(names)}"

    def test_tokenizer_fits_the_model(self, tmp_path: Path) -> None:
        opened = self._open(self.write(tmp_path))
        config, tokenizer = self._config(opened), opened.tokenizer()
        assert tokenizer.vocab_size <= config.vocab_size, (
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        )
        ids = tokenizer.encode(self.text, add_special_tokens=False)
        assert tokenizer.decode(ids) == self.text, f"{self.text!r} comes back as {tokenizer.decode(ids)!r}"
        beyond = [index for index in (*config.eos_token_ids, *tokenizer.eos_token_ids) if index >= config.vocab_size]
        assert not beyond, f"EOS tokens {beyond} are outside the vocabulary"
        ends, others = set(config.eos_token_ids), set(tokenizer.eos_token_ids)
        assert not ends or not others or ends & others, f"configuration ends at {ends}, tokenizer at {others}"
        begins = {config.bos_token_id, tokenizer.bos_token_id} - {None}
        assert len(begins) < 2, f"configuration and tokenizer have different BOS tokens: {begins}"

    def test_weights_fill_the_model(self, tmp_path: Path) -> None:
        """The model of the architecture takes the weights as they come, and computes with them."""
        opened = self._open(self.write(tmp_path))
        config = self._config(opened)
        target = find_provider("models", self.model or config.architecture, "the checkpoint's architecture")
        harness = ModelHarness(target, config, opened.weights(), max_model_len=64, num_blocks=100)
        logits = harness.run(opened.tokenizer().encode(self.text)[:20])
        assert logits.isfinite().all(), "the logits of the loaded model are not finite"

    # ── Damaged ones ────────────────────────────────────────────────────────────────────────────────────────────

    def test_truncated_files(self, tmp_path: Path, seed: int) -> None:
        """A file cut short is refused, unless nothing that counts is missing."""

        def cut(data: bytes, rng: random.Random) -> bytes:
            edges = (0, 1, 4, 8, len(data) - 1)
            return data[: edges[seed] if seed < len(edges) else _place(len(data), rng)]

        intact = self._read(self._open(self.write(tmp_path)))
        for file, reading in self._damaged(tmp_path, seed, cut):
            size = file.stat().st_size
            assert reading is None or reading == intact, f"{file.name}, cut to {size} bytes, is taken for whole"

    def test_flipped_bytes(self, tmp_path: Path, seed: int) -> None:
        def flip(data: bytes, rng: random.Random) -> bytes:
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                damaged[_place(len(data), rng)] ^= rng.randint(1, 255)
            return bytes(damaged)

        self._survive(tmp_path, seed, flip)

    def test_absurd_numbers(self, tmp_path: Path, seed: int) -> None:
        """Lengths and offsets that no file can have; in texts, values no configuration can."""

        def overwrite(data: bytes, rng: random.Random) -> bytes:
            numbers = list(re.finditer(rb"\d+", data)) if data.isascii() else []
            if numbers:
                place = rng.choice(numbers)
                return data[: place.start()] + rng.choice(_ABSURD) + data[place.end() :]
            damaged = bytearray(data)
            value = rng.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
            struct.pack_into("<Q", damaged, _place(len(data) - 7, rng), value)
            return bytes(damaged)

        self._survive(tmp_path, seed, overwrite)

    def test_noise(self, tmp_path: Path, seed: int) -> None:
        self._survive(tmp_path, seed, lambda data, rng: data[:8] + rng.randbytes(rng.randint(0, 200)))

    def test_missing_files(self, tmp_path: Path) -> None:
        """A checkpoint without one of its files, or nothing at all where one should be."""
        path = self.write(tmp_path)
        for file in _files(tmp_path):
            data = file.read_bytes()
            file.unlink()
            reading = self._outcome(path, file)
            file.write_bytes(data)
            assert reading is None or file != path, "a file that is not there is read"
        assert self._outcome(tmp_path / "no-such-model", tmp_path / "no-such-model") is None

    def _survive(self, folder: Path, seed: int, damage: Callable[[bytes, random.Random], bytes]) -> None:
        for _ in self._damaged(folder, seed, damage):
            pass

    def _damaged(
        self, folder: Path, seed: int, damage: Callable[[bytes, random.Random], bytes]
    ) -> Iterator[tuple[Path, Reading | None]]:
        """Damage one file after the other; each with what is read of the checkpoint then (None: `CheckpointError`)."""
        path = self.write(folder)
        for number, file in enumerate(_files(folder)):
            data = file.read_bytes()
            if len(data) < 8:
                continue
            file.write_bytes(damage(data, random.Random(1000 * seed + number)))
            yield file, self._outcome(path, file)
            file.write_bytes(data)

    def _outcome(self, path: Path, file: Path) -> Reading | None:
        what = f"reading the checkpoint with {file.name} damaged"
        try:
            with _memory_limit(self.memory_limit), time_limit(self.time_limit_s, what):
                return self._read(self._open(path))
        except CheckpointError as error:
            assert file.name in str(error) or str(path) in str(error), f"{what}: the error names no file: {error}"
            return None
        except OutOfTimeError as error:
            raise AssertionError(str(error)) from error
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__} instead of a CheckpointError: {error}") from error

    # ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, path: Path) -> Checkpoint:
        opened: Checkpoint = self.target(self.target_options, path)
        return opened

    def _read(self, opened: Checkpoint) -> Reading:
        config, tokenizer = opened.raw_config(), opened.tokenizer()
        tokens = tokenizer.encode(self.text)
        tokenizer.decode(tokens)
        opened.config()
        count = opened.num_weights()
        weights = [(name, _format(tensor), tuple(tensor.shape), _checksum(tensor)) for name, tensor in opened.weights()]
        return Reading(config, tokens, weights, count)

    def _config(self, opened: Checkpoint) -> ModelConfig:
        """With the help of the model's provider, as an engine reads it."""
        raw = opened.raw_config()
        named = self.model or raw["architectures"][0]
        return (
            find_offer("models", named).model_config(raw, "raw_config") if isinstance(named, str) else opened.config()
        )


def _files(folder: Path) -> Sequence[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _place(size: int, rng: random.Random) -> int:
    """An offset; half of them near the start, where headers are."""
    return int(size * (rng.random() ** 4 if rng.random() < 0.5 else rng.random()))


def _format(weight: torch.Tensor | BlockWeight) -> str:
    return weight.format if isinstance(weight, BlockWeight) else str(weight.dtype)


def _checksum(weight: torch.Tensor | BlockWeight) -> int:
    tensor = weight.dequantize() if isinstance(weight, BlockWeight) else weight
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


@contextmanager
def _memory_limit(nbytes: int) -> Iterator[None]:
    """In the block this process cannot take more than `nbytes` on top of what it has; what asks for it fails. Without
    effect on systems that cannot say or limit it."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
