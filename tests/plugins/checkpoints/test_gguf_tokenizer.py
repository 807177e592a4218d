"""Tokenizers from GGUF files cut text as the models' own do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlace.errors import CheckpointError
from interlace.plugins.checkpoints.gguf import GgufCheckpoint

TEXTS = [
    "Hello, world! It's a test; we'll see what they've done, I'd say.",
    "def f(x):\n    if x > y:\n\t\treturn x  # comment\n\n\n\treturn y\r\n",
    "naïve café — “quotes” … ½ × ² €",
    "你好，世界。 こんにちは 안녕하세요 Привет שלום مرحبا नमस्ते",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 a\u0301 ﬁ \u00a0 \u2003 x",
    "   leading,  double   triple      many               spaces   ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    'https://example.org/a?b=c&d=e#f  {"key": [true, null]} <table><tr></tr></table>',
    "",
    " ",
    "\n\n\n\n",
]
DIGITS = "In 2024 there were 1,234,567.89 of 42 kinds; 0x1F, 3.14159 and ١٢٣."


def tokenizer_of(path):
    return GgufCheckpoint(GgufCheckpoint.Options(), path).tokenizer()


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path):
    return tokenizer_of(smollm2_path)


def test_smollm2_facts(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (49152, 1, (2,))
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.encode("Hello world") == [19556, 905]  # no BOS
    assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]


def test_smollm2_cuts_every_digit_off(smollm2_tokenizer):
    pieces = [smollm2_tokenizer.token_text(index) for index in smollm2_tokenizer.encode(DIGITS)]
    assert pieces[:7] == ["In", " ", "2", "0", "2", "4", " there"]
    assert not [piece for piece in pieces if re.search(r"\d.|.\d", piece)]


@pytest.mark.parametrize("text", [*TEXTS, DIGITS])
def test_smollm2_round_trip(smollm2_tokenizer, text):
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text), skip_special_tokens=False) == text


@given(text=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"]), max_size=60))
def test_smollm2_round_trip_of_any_text(smollm2_tokenizer, text):
    """Of characters for which SmolLM2's vocabulary has every byte: those of some others are missing."""
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_equals_transformers(smollm2_path, smollm2_tokenizer):
    """transformers does not know the `smollm` way of cutting text, so it is told; without numbers it need not be."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)
    for text in TEXTS:
        if not any(character.isnumeric() for character in text):
            assert smollm2_tokenizer.encode(text) == reference.encode(text), text
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [*TEXTS, DIGITS]:
        assert smollm2_tokenizer.encode(text) == reference.encode(text), text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gemma3_equals_transformers(gemma3_path):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(gemma3_path.parent), gguf_file=gemma3_path.name)
    tokenizer = tokenizer_of(gemma3_path)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (262144, 2, (1,))
    for text in [*TEXTS, DIGITS]:
        ids = tokenizer.encode(text)
        assert ids[0] == 2 and ids == reference.encode(text), text
        assert tokenizer.decode(ids) == text == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_chat_equals_transformers(smollm2_path, smollm2_tokenizer):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)
    user, answer = {"role": "user", "content": "Hi & <b>bye</b>"}, {"role": "assistant", "content": "Hello!"}
    system = {"role": "system", "content": "Be brief."}
    for messages in ([user], [system, user], [user, answer, user], [system, user, answer]):
        for prompt in (True, False):
            assert smollm2_tokenizer.render_chat(messages, prompt) == reference.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )


def test_smollm2_chat(smollm2_tokenizer):
    text = smollm2_tokenizer.render_chat([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    ids = smollm2_tokenizer.encode_chat([{"role": "user", "content": "U"}])
    assert ids[0] == 1 and smollm2_tokenizer.decode(ids, False).startswith("<|im_start|>system\nYou are")


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a 123's", ["a", " 123", "'s"]),
        ("smollm", "a 123's", ["a", " ", "1", "2", "3", "'s"]),
        ("qwen2", "a 123's", ["a", " ", "1", "2", "3", "'s"]),
        ("llama-bpe", "a 12345'S", ["a", " ", "123", "45", "'S"]),
        ("tekken", "aB 12", ["a", "B", " ", "1", "2"]),
    ],
)
def test_ways_of_cutting(tiny_gguf, pre, text, pieces):
    backend = tokenizer_of(tiny_gguf(metadata={"tokenizer.ggml.pre": pre})).backend
    found = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == pieces


def test_llama3_takes_whole_words_and_adds_bos(tiny_gguf):
    """`ab` is in the vocabulary; without its merge only a lookup of the whole word finds it."""
    merges = {"tokenizer.ggml.merges": ["c d"]}
    with_lookup = tokenizer_of(tiny_gguf(metadata={**merges, "tokenizer.ggml.pre": "llama-bpe"}))
    without = tokenizer_of(tiny_gguf(metadata={**merges, "tokenizer.ggml.pre": "gpt-2"}))
    assert with_lookup.encode("ab") == [258, 256]
    assert len(without.encode("ab")) == 2 and 256 not in without.encode("ab")


def test_bos_and_eos_flags(tiny_gguf):
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = tokenizer_of(tiny_gguf(metadata=flags))
    assert tokenizer.encode("ab") == [258, 256, 259]
    assert tokenizer.encode("ab", add_special_tokens=False) == [256]
    assert tokenizer.decode([258, 256, 259]) == "ab"
    assert tokenizer.decode([258, 256, 259], skip_special_tokens=False) == "<|bos|>ab<|eos|>"


def test_control_tokens_are_special_and_user_defined_ones_are_text(tiny_gguf):
    tokenizer = tokenizer_of(tiny_gguf())
    assert tokenizer.encode("ab<think>cd<|im_end|>") == [256, 261, 257, 260]
    assert tokenizer.special_ids == {258, 259, 260}
    assert tokenizer.decode([256, 261, 260]) == "ab<think>"


def test_end_of_turn_ends_an_answer(tiny_gguf):
    assert tokenizer_of(tiny_gguf()).eos_token_ids == (259,)
    named = tiny_gguf(metadata={"tokenizer.ggml.eot_token_id": 260})
    assert tokenizer_of(named).eos_token_ids == (259, 260)
    written = tiny_gguf(metadata={"tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>"})
    checkpoint = GgufCheckpoint(GgufCheckpoint.Options(), written)
    assert checkpoint.tokenizer().eos_token_ids == (259, 260) == checkpoint.config().eos_token_ids


def spm_tokenizer(tiny_gguf, tiny_weights, metadata):
    return tokenizer_of(tiny_gguf(weights=tiny_weights("llama", vocab=272), metadata=metadata))


def test_sentencepiece(tiny_gguf, tiny_weights, spm_metadata):
    tokenizer = spm_tokenizer(tiny_gguf, tiny_weights, spm_metadata)
    names = spm_metadata["tokenizer.ggml.tokens"]

    def pieces(text):
        return [names[index] for index in tokenizer.encode(text)]

    assert pieces("hello") == ["<s>", "▁hello"]  # a space in front, BOS in front of that
    assert pieces("hellhe") == ["<s>", "▁he", "ll", "he"]
    assert pieces("hel") == ["<s>", "▁he", "l"]  # "he" has a better score than "el"
    assert pieces("oel") == ["<s>", "▁", "o", "el"]
    assert pieces("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert pieces("he<turn>he") == ["<s>", "▁he", "<turn>", "▁he"]
    for text in ("hello hello", "é 你", "he", "  hello", "hello  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_text(names.index("▁he")) == " he"


def test_sentencepiece_without_prefix(tiny_gguf, tiny_weights, spm_metadata):
    flags = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = spm_tokenizer(tiny_gguf, tiny_weights, spm_metadata | flags)
    names = spm_metadata["tokenizer.ggml.tokens"]
    assert [names[index] for index in tokenizer.encode("he  he")] == ["he", "  ", "he"]
    assert tokenizer.decode(tokenizer.encode(" he")) == " he"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.pre": "quen2"}, r"ggml\.pre is 'quen2'.*Did you mean 'qwen2'"),
        ({"tokenizer.ggml.model": "t5"}, r"ggml\.model is 't5'; known: gpt2, llama"),
        ({"tokenizer.ggml.tokens": None}, r"ggml\.tokens is missing"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type has 2 entries for 262 tokens"),
        ({"tokenizer.ggml.merges": ["a b", "cd"]}, r"ggml\.merges has the entry 'cd'"),
        ({"tokenizer.ggml.merges": ["a x"]}, "`ax` out of vocabulary"),
        ({"tokenizer.ggml.bos_token_id": 262}, "bos_token_id is 262, outside the vocabulary of 262"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id is '</s>'; a value of type int"),
        ({"tokenizer.chat_template": 3}, "chat_template is not a text"),
    ],
)
def test_wrong_vocabularies_are_named(tiny_gguf, metadata, message):
    path = tiny_gguf(metadata=metadata)
    with pytest.raises(CheckpointError, match=message) as raised:
        tokenizer_of(path)
    assert str(path) in str(raised.value)
