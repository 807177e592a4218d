"""The conformance suite of checkpoint formats: all built-in ones pass it, formats that are wrong on purpose do not."""

from __future__ import annotations

import contextlib
import json
import random
import re
import struct
import sys
from typing import ClassVar

import pytest
from safetensors.torch import save_file
from tokenizers import normalizers

from interlace.errors import CheckpointError
from interlace.interfaces.checkpoint import Checkpoint
from interlace.plugins.checkpoints.dummy import DummyCheckpoint, byte_tokenizer
from interlace.plugins.checkpoints.safetensors import SafetensorsCheckpoint
from interlace.testing.checkpoint_suite import CheckpointConformance
from interlace.testing.conformance import failures

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


class Dummy(CheckpointConformance):
    checkpoint = "dummy"
    is_found = False
    options: ClassVar = {"seed": 3}

    def write(self, folder):
        (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "bfloat16"}))
        return folder


class Safetensors(CheckpointConformance):
    checkpoint = "safetensors"

    def write(self, folder):
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 5]}))
        byte_tokenizer("tiny").backend.save(str(folder / "tokenizer.json"))
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": "{{ messages }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
        weights = list(DummyCheckpoint(DummyCheckpoint.Options(), folder / "config.json").weights())
        self.save(folder, dict(weights))
        return folder

    def save(self, folder, weights):
        save_file(weights, folder / "model.safetensors")


class Sharded(Safetensors):
    def save(self, folder, weights):
        placed = {}
        for number, names in enumerate((list(weights)[:9], list(weights)[9:]), start=1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: weights[name] for name in names}, folder / shard)
            placed |= dict.fromkeys(names, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


class Gguf(CheckpointConformance):
    checkpoint = "gguf"

    @pytest.fixture(autouse=True)
    def _fixtures(self, gguf_writer, tiny_weights, spm_metadata):
        self.writer, self.random_weights, self.spm = gguf_writer, tiny_weights, spm_metadata

    def write(self, folder):
        metadata = {"tokenizer.chat_template": "{{ messages[0]['content'] }}", "general.name": "tiny"}
        return self.writer(folder / "tiny.gguf", "llama", kind="Q4_0", metadata=metadata)


class GgufWithSentencepiece(Gguf):
    text = "hello"

    def write(self, folder):
        weights = self.random_weights("gemma3", vocab=len(self.spm["tokenizer.ggml.tokens"]))
        return self.writer(folder / "tiny.gguf", "gemma3", weights, kind="Q4_0", metadata=self.spm)


class GgufShards(Gguf):
    def write(self, folder):
        self.writer(folder / "tiny.gguf", "llama", split_max_tensors=12)
        return min(folder.glob("*.gguf"))


class TestDummy(Dummy):
    seeds = range(10)


class TestSafetensors(Safetensors):
    seeds = range(10)


class TestShardedSafetensors(Sharded):
    seeds = range(5)


class TestGguf(Gguf):
    seeds = range(15)


class TestGgufWithSentencepiece(GgufWithSentencepiece):
    seeds = range(10)


class TestGgufShards(GgufShards):
    seeds = range(5)


@pytest.mark.slow
class TestDummyThoroughly(Dummy):
    seeds = range(100, 300)


@pytest.mark.slow
class TestSafetensorsThoroughly(Sharded):
    seeds = range(100, 200)


@pytest.mark.slow
class TestGgufThoroughly(Gguf):
    seeds = range(100, 300)


@pytest.mark.slow
class TestGgufWithSentencepieceThoroughly(GgufWithSentencepiece):
    seeds = range(100, 300)


# ── Formats that are wrong on purpose ───────────────────────────────────────────────────────────────────────────────


class TakesAll(SafetensorsCheckpoint):
    @classmethod
    def matches(cls, path):
        return True


class TakesNothing(SafetensorsCheckpoint):
    @classmethod
    def matches(cls, path):
        return False


class CountsOneMore(SafetensorsCheckpoint):
    def num_weights(self):
        return super().num_weights() + 1


class OnlyOnce(SafetensorsCheckpoint):
    def weights(self):
        self.__dict__.setdefault("given", super().weights())
        return self.given


class OtherOrder(SafetensorsCheckpoint):
    def weights(self):
        found = list(super().weights())
        random.Random(id(self)).shuffle(found)
        yield from found


class Twice(SafetensorsCheckpoint):
    def weights(self):
        yield from super().weights()
        yield next(super().weights())

    def num_weights(self):
        return None


class OtherNames(SafetensorsCheckpoint):
    def weights(self):
        return ((name.removeprefix("model."), tensor) for name, tensor in super().weights())


class OtherVocabulary(SafetensorsCheckpoint):
    def raw_config(self):
        return super().raw_config() | {"vocab_size": 200}


class OtherEnd(SafetensorsCheckpoint):
    def raw_config(self):
        return super().raw_config() | {"eos_token_id": 7}


class EndsOutside(SafetensorsCheckpoint):
    def raw_config(self):
        return super().raw_config() | {"eos_token_id": [257, 4000]}


class LosesSpaces(SafetensorsCheckpoint):
    def tokenizer(self):
        tokenizer = super().tokenizer()
        tokenizer.backend.normalizer = normalizers.Replace(" ", "")
        return tokenizer


class TakesParts(SafetensorsCheckpoint):
    """What cannot be read is not there."""

    def weights(self):
        with contextlib.suppress(CheckpointError):
            yield from super().weights()

    def num_weights(self):
        return None


class NamesNoFile(SafetensorsCheckpoint):
    def weights(self):
        try:
            yield from super().weights()
        except CheckpointError as error:
            raise CheckpointError("the model is broken") from error

    num_weights = Checkpoint.num_weights


class LeaksErrors(SafetensorsCheckpoint):
    def raw_config(self):
        return json.loads((self.path / "config.json").read_text())


class Hangs(SafetensorsCheckpoint):
    def raw_config(self):
        try:
            return super().raw_config()
        except CheckpointError:
            while True:
                pass


class BelievesLengths(SafetensorsCheckpoint):
    """Makes room for what a header announces."""

    def num_weights(self):
        (length,) = struct.unpack("<Q", (self.path / "model.safetensors").read_bytes()[:8].ljust(8))
        bytearray(length)
        return super().num_weights()


WRONG = [
    (TakesAll, "test_does_not_match_others", "matches takes empty"),
    (TakesNothing, "test_matches_its_own", "matches says False"),
    (CountsOneMore, "test_weights_are_well_formed", "num_weights is 22, weights yields 21"),
    (Twice, "test_weights_are_well_formed", "a tensor comes twice"),
    (OnlyOnce, "test_reads_the_same_twice", "weights differ when the checkpoint is read again"),
    (OtherOrder, "test_reads_the_same_twice", "weights differ when the checkpoint is read"),
    (OtherNames, "test_weights_fill_the_model", "missing: model.embed_tokens.weight"),
    (OtherVocabulary, "test_tokenizer_fits", "the tokenizer has 258 tokens, the model 200"),
    (OtherVocabulary, "test_weights_fill_the_model", r"embed_tokens.weight is \[300, 32\] instead of \[200, 32\]"),
    (OtherEnd, "test_tokenizer_fits", r"configuration ends at \{7\}, tokenizer at \{(257, 5|5, 257)\}"),
    (EndsOutside, "test_tokenizer_fits", r"EOS tokens \[4000\] are outside"),
    (LosesSpaces, "test_tokenizer_fits", "'some text 12' comes back as 'sometext12'"),
    (TakesParts, "test_truncated", "model.safetensors, cut to .* bytes, is taken for whole"),
    (NamesNoFile, "test_truncated", "the error names no file: the model is broken"),
    (LeaksErrors, "test_truncated", "config.json damaged: JSONDecodeError instead of a CheckpointError"),
    (LeaksErrors, "test_missing", "config.json damaged: FileNotFoundError instead of a CheckpointError"),
    (Hangs, "test_truncated", "config.json damaged has not ended after 2 s"),
    (BelievesLengths, "test_absurd|test_flipped|test_trunc", "model.safetensors damaged( has not ended|: MemoryError)"),
]


@pytest.mark.parametrize(
    ("wrong", "test", "message"), WRONG, ids=[f"{entry[0].__name__}-{entry[1]}" for entry in WRONG]
)
def test_wrong_formats_fail(wrong, test, message):
    class Suite(Safetensors):
        checkpoint = wrong
        time_limit_s = 2.0
        seeds = range(30)

    found = {name: text for only in test.split("|") for name, text in failures(Suite, only=only).items()}
    assert found and all(re.search(message, text) for text in found.values()), found


def test_a_format_that_needs_torch_fails(tmp_path, monkeypatch):
    """Installed as a package would be: found by its entry point, imported in a fresh process."""
    package = tmp_path / "interlace_heavy"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from interlace import Provider, hookimpl\n"
        "@hookimpl\n"
        "def interlace_checkpoints():\n"
        "    yield Provider(name='heavy', target='interlace_heavy.heavy:Heavy', api='1')\n"
    )
    (package / "heavy.py").write_text(
        "import torch\n"
        "from interlace.plugins.checkpoints.safetensors import SafetensorsCheckpoint\n"
        "class Heavy(SafetensorsCheckpoint): ...\n"
    )
    info = tmp_path / "interlace_heavy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: interlace-heavy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[interlace]\nheavy = interlace_heavy\n")
    monkeypatch.syspath_prepend(tmp_path)

    class Suite(Safetensors):
        checkpoint = "heavy"

    try:
        found = failures(Suite, only="without_torch")
    finally:
        for name in ("interlace_heavy", "interlace_heavy.heavy"):
            sys.modules.pop(name, None)
    assert "importing interlace_heavy.heavy imports torch" in found["test_importable_without_torch"]


def test_what_is_missing_is_said():
    suite = type("Suite", (CheckpointConformance,), {"checkpoint": "gguf"})
    assert "write a method `write(self, folder)` in Suite" in failures(suite, only="own")["test_matches_its_own"]
