"""Tokenizers from Hugging Face style directories."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from interlace.errors import CheckpointError, InvalidRequestError
from interlace.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS, TURN = 256, 257, 258
SPECIAL = ["<s>", "</s>", "<turn>"]


@pytest.fixture
def directory(tmp_path):
    """A byte-level tokenizer with BOS in front, as its files."""
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate([*BYTES, *SPECIAL, "ab"])}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config", {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None})
    return tmp_path


def write(directory, name, value):
    (directory / f"{name}.json").write_text(json.dumps(value))


def test_encode_and_decode(directory):
    tokenizer = Tokenizer.from_directory(directory)
    ids = tokenizer.encode("xaby, long enough")
    assert ids[0] == BOS and ids[2] == 259 and len(ids) == 17, "truncation of the file must be off"
    assert tokenizer.decode(ids) == "xaby, long enough"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>xaby, long enough"
    assert tokenizer.encode("ab</s>", add_special_tokens=False) == [259, EOS]
    assert tokenizer.decode([259, 100_000]) == "ab"
    assert (tokenizer.vocab_size, tokenizer.bos_token_id) == (260, BOS)
    assert tokenizer.token_text(EOS) == "</s>" and tokenizer.token_text(259) == "ab"
    assert tokenizer.name == directory.name


def test_halves_of_characters(directory):
    tokenizer = Tokenizer.from_directory(directory)
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert tokenizer.decode(ids) == "é" and tokenizer.decode(ids[:1]) == "\ufffd" == tokenizer.token_text(ids[0])


@pytest.mark.parametrize("text", [None, 3, ["a"], "\ud800"])
def test_what_is_not_text(directory, text):
    with pytest.raises(InvalidRequestError, match="valid Unicode text"):
        Tokenizer.from_directory(directory).encode(text)


def test_where_eos_comes_from(directory):
    assert Tokenizer.from_directory(directory).eos_token_ids == (EOS,)
    write(directory, "config", {"eos_token_id": 5})
    assert Tokenizer.from_directory(directory).eos_token_ids == (5,)
    write(directory, "generation_config", {"eos_token_id": [EOS, TURN]})
    assert Tokenizer.from_directory(directory).eos_token_ids == (EOS, TURN)
    write(directory, "generation_config", {"temperature": 1.0})
    assert Tokenizer.from_directory(directory).eos_token_ids == (5,)


def test_special_tokens_map_is_second_to_tokenizer_config(directory):
    write(directory, "special_tokens_map", {"bos_token": "</s>", "pad_token": {"content": "<turn>"}})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<turn>"}
    assert tokenizer.special_ids == {BOS, EOS, TURN}, "a named token is special even if tokenizer.json does not say so"
    assert tokenizer.decode([TURN, 259]) == "ab"


def test_added_tokens_only_in_tokenizer_config(directory):
    listed = {"260": {"content": "<think>", "special": False}, "261": {"content": "<end>", "special": True}}
    write(directory, "tokenizer_config", {"added_tokens_decoder": listed})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("<think>ab<end>", False) == [260, 259, 261]
    assert tokenizer.special_ids == {BOS, EOS, 261} and tokenizer.vocab_size == 262
    write(directory, "tokenizer_config", {"added_tokens_decoder": {"999": {"content": "<think>"}}})
    with pytest.raises(CheckpointError, match=r"'<think>' should have id 999.*do not belong together"):
        Tokenizer.from_directory(directory)
    write(directory, "tokenizer_config", {"added_tokens_decoder": {"x": {}}})
    with pytest.raises(CheckpointError, match="added_tokens_decoder is malformed"):
        Tokenizer.from_directory(directory)


def test_where_the_chat_template_comes_from(directory):
    assert Tokenizer.from_directory(directory).chat_template is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write(directory, "tokenizer_config", {"chat_template": several})
    assert Tokenizer.from_directory(directory).chat_template == "D"
    write(directory, "chat_template", {"chat_template": "J"})
    assert Tokenizer.from_directory(directory).chat_template == "J"
    (directory / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_directory(directory).chat_template == "F"
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read"):
        Tokenizer.from_directory(directory)


def test_chat(directory):
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = Tokenizer.from_directory(directory)
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.render_chat(messages) == "<s>ab"
    assert tokenizer.encode_chat(messages) == [BOS, 259], "one BOS: the template's"
    other = tokenizer.with_chat_template("{{ eos_token }}")
    assert other.encode_chat(messages) == [EOS] and tokenizer.encode_chat(messages) == [BOS, 259]


def test_no_chat_template(directory):
    with pytest.raises(InvalidRequestError, match=r"has no chat template.*--chat-template FILE.*completion-style"):
        Tokenizer.from_directory(directory).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("damage", [b"", b"{", b'{"version": "1.0"}', b"\x00\xff"])
def test_damaged_tokenizer_json(directory, damage):
    (directory / "tokenizer.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer file"):
        Tokenizer.from_directory(directory)


def test_damaged_tokenizer_config(directory):
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer.from_directory(directory)


def test_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_older_formats_are_converted(tmp_path):
    """vocab.json and merges.txt, the GPT-2 way."""
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate([*BYTES, "<|endoftext|>", "ab"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    write(tmp_path, "tokenizer_config", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("ab") == [257] and tokenizer.eos_token_ids == (256,)


@pytest.mark.filterwarnings("ignore")
def test_a_format_that_cannot_be_converted(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    write(tmp_path, "tokenizer_config", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: there is no tokenizer\.json.*fetch"):
        Tokenizer.from_directory(tmp_path)


def test_many_threads_share_one(directory):
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = Tokenizer.from_directory(directory)

    def work(index):
        text = f"ab {index} " * 50
        assert tokenizer.encode_chat([{"role": "user", "content": text}]) == tokenizer.encode(text)[1:]
        return tokenizer.decode(tokenizer.encode(text)) == text

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_light_import():
    code = "import sys, interlace.tokenizer; assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
