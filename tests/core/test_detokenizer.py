"""Incremental detokenisation and stop strings."""

import itertools
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from interlace.engine.detokenizer import MAX_PENDING_TOKENS, REPLACEMENT, Detokenizer, StopStrings
from interlace.testing.front import byte_fallback_tokenizer, byte_tokenizer
from interlace.tokenizer import Tokenizer

TEXTS = [
    "Hello, world! How are you?",
    "naïve café — “quotes” … ½",
    "日本語のテキストと漢字。한국어도 있어요",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 😀😁😂",
    "नमस्ते العربية עברית",
    "  leading spaces\n\n\tand tabs  ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
    "a literal \ufffd in the text \ufffd",
]


def bert_style_tokenizer() -> Tokenizer:
    """A decoder that is not byte-wise: WordPiece joins pieces and sets spaces between words."""
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "un", "##believ", "##able", ",", "!"]
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    return Tokenizer(backend, name="words", eos_token_ids=(2,))


def pieces(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = Detokenizer(tokenizer).stream(**options)
    return [*(stream.push(token) for token in ids), stream.flush()]


MAKERS = [byte_tokenizer, byte_fallback_tokenizer, lambda: byte_fallback_tokenizer(False)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("text", TEXTS)
def test_real_texts_come_out_whole_and_never_in_halves(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text)
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    assert "".join(got).count(REPLACEMENT) == text.count(REPLACEMENT)


@pytest.mark.parametrize("make", MAKERS)
def test_each_character_comes_with_its_last_byte(make):
    tokenizer = make()
    ids = tokenizer.encode("😀é", add_special_tokens=False)
    got = pieces(tokenizer, ids)
    assert [piece for piece in got if piece.strip()] == ["😀", "é"]
    assert got[-1] == ""


@given(st.lists(st.integers(0, 256), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_equals_decode_for_any_ids(ids, skip):
    tokenizer = byte_tokenizer()
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


@given(st.lists(st.lists(st.integers(0, 256), max_size=6), max_size=8), st.booleans())
@settings(max_examples=200, deadline=None)
def test_tokens_pushed_together_give_the_text_of_tokens_pushed_one_by_one(parts, skip):
    tokenizer = byte_tokenizer()
    together, single = (Detokenizer(tokenizer).stream(skip_special_tokens=skip) for _ in range(2))
    for part in parts:
        assert together.push_all(part) == "".join(map(single.push, part))
    assert together.flush() == single.flush()


def test_byte_level_equals_decode_for_bytes_near_the_borders_of_utf8():
    tokenizer = byte_tokenizer()
    id_of = {bytes([b]): tokenizer.backend.token_to_id(char) for b, char in _alphabet().items()}
    chooser = random.Random(7)
    nasty = [0x41, 0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xA0, 0xF0, 0x90, 0xF4, 0x8F, 0xFF]
    for _ in range(2000):
        ids = [id_of[bytes([chooser.choice(nasty)])] for _ in range(chooser.randint(1, 9))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def _alphabet() -> dict[int, str]:
    """GPT-2's bytes to characters, derived from the library: how it writes each byte that forms a character alone or
    in a pair."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = {}
    for char in map(chr, itertools.chain(range(0x800), range(0x800, 0x10000, 0x40), range(0x10000, 0x110000, 0x4000))):
        if 0xD800 <= ord(char) < 0xE000:
            continue
        written = pre.pre_tokenize_str(char)[0][0]
        found.update(zip(char.encode(), written, strict=True))
    missing = set(range(256)) - set(found)  # bytes that occur in no UTF-8 text stand for themselves in the alphabet
    found.update({byte: chr(byte) for byte in missing})
    return found


def run_text(run: bytes) -> str:
    """A run of byte tokens: characters up to the first bad byte, then one mark per byte."""
    try:
        return run.decode()
    except UnicodeDecodeError as error:
        return run[: error.start].decode() + REPLACEMENT * (len(run) - error.start)


@given(st.lists(st.integers(0, 300) | st.integers(0xE0, 0xF4).map(lambda b: b + 2), max_size=40))
@settings(max_examples=300, deadline=None)
def test_byte_fallback_equals_decode_but_for_characters_given_out_before_a_bad_byte(ids):
    tokenizer = byte_fallback_tokenizer(strip_leading_space=False)
    kept = [token for token in ids if token != 1]
    expected = ""
    for is_byte, group in itertools.groupby(kept, lambda token: 2 <= token < 258):
        if is_byte:
            run = bytes(token - 2 for token in group)
            expected += run_text(run)
        else:
            expected += "".join(tokenizer.backend.id_to_token(token).replace("▁", " ") for token in group)
    assert "".join(pieces(tokenizer, ids)) == expected
    if REPLACEMENT not in expected:
        assert expected == tokenizer.decode(ids)
    assert len(expected) <= len(tokenizer.decode(ids))


def test_byte_fallback_keeps_what_it_gave_out_and_marks_every_bad_byte():
    tokenizer = byte_fallback_tokenizer()
    run = [byte + 2 for byte in "é".encode() + b"\xff\xe2"]
    letter = tokenizer.backend.token_to_id("a")
    got = pieces(tokenizer, [letter, *run, letter])
    assert got == ["a", "", "é", REPLACEMENT, REPLACEMENT, "a", ""]
    assert tokenizer.decode([letter, *run, letter]) == "a" + REPLACEMENT * 4 + "a"


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback_tokenizer])
def test_invalid_end_is_flushed(make):
    tokenizer = make()
    ids = tokenizer.encode("😀", add_special_tokens=False)[:-1]
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    assert got[-1].startswith(REPLACEMENT) and "".join(got[:-1]).strip() == ""


def test_special_tokens_are_skipped_or_written():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer.encode("ab"), 256, *tokenizer.encode("c"), 256]
    assert "".join(pieces(tokenizer, ids)) == "abc"
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=False)) == "ab<|end|>c<|end|>"


def test_a_special_token_between_the_bytes_of_a_character_does_not_break_it():
    tokenizer = byte_tokenizer()
    first, second = tokenizer.encode("é")
    assert "".join(pieces(tokenizer, [first, 256, second])) == tokenizer.decode([first, 256, second]) == "é"


def test_ids_beyond_the_vocabulary_have_no_text():
    tokenizer = byte_tokenizer()
    assert "".join(pieces(tokenizer, [*tokenizer.encode("a"), 9999])) == tokenizer.decode(
        [*tokenizer.encode("a"), 9999]
    )


@pytest.mark.parametrize("skip", [True, False])
def test_other_decoders_are_served_by_windows(skip):
    tokenizer = bert_style_tokenizer()
    ids = [1, 3, 4, 5, 6, 10, 7, 8, 9, 11, 2]
    got = pieces(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(got) == tokenizer.decode(ids, skip)
    assert got[1].strip() == "the"


def test_no_spaces_between_special_tokens_when_not_wanted():
    tokenizer = bert_style_tokenizer()
    ids = [4, 1, 2, 2, 4]
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=False)) == "cat [CLS] [SEP] [SEP] cat"
    wanted = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    assert "".join(pieces(tokenizer, ids, **wanted)) == "cat[CLS][SEP][SEP]cat"


def test_a_window_never_grows_without_limit():
    tokenizer = byte_tokenizer()
    decoder = Detokenizer(tokenizer)
    decoder._byte_level = None
    stream = decoder.stream()
    lead = tokenizer.backend.token_to_id("â")  # the byte E2: never completed
    out = [stream.push(lead) for _ in range(200)]
    assert len(stream._window) <= 2 * MAX_PENDING_TOKENS
    assert sum(map(len, out)) >= 200 - 2 * MAX_PENDING_TOKENS


@pytest.mark.parametrize("text", TEXTS)
def test_windows_agree_with_bytes(text):
    tokenizer = byte_tokenizer()
    decoder = Detokenizer(tokenizer)
    decoder._byte_level = None
    stream = decoder.stream()
    ids = tokenizer.encode(text)
    assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == text


# ── Stop strings ────────────────────────────────────────────────────────────────────────────────────────────────


def feed(stops: list[str], parts: list[str], include: bool = False) -> tuple[list[str], str | None]:
    finder = StopStrings(stops, include)
    out = []
    for part in parts:
        out.append(finder.push(part))
        if finder.matched is not None:
            return out, finder.matched
    return [*out, finder.flush()], finder.matched


def test_a_stop_string_is_found_across_pieces_and_cut_off():
    assert feed(["STOP"], ["ab S", "TO", "P cd"]) == (["ab ", "", ""], "STOP")
    assert feed(["STOP"], ["ab S", "TO", "P cd"], include=True) == (["ab ", "", "STOP"], "STOP")


def test_text_is_held_back_only_while_a_stop_string_could_begin():
    assert feed(["\n\n"], ["a\n", "b\n", "\n", "c"]) == (["a", "\nb", ""], "\n\n")
    assert feed(["xyz"], ["ax", "y", "q"]) == (["a", "", "xyq", ""], None)
    assert feed(["xyz"], ["axy"]) == (["a", "xy"], None)


def test_overlapping_beginnings():
    assert feed(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], "aab")


def test_the_first_to_be_complete_wins_and_of_equals_the_longest():
    assert feed(["bc", "abcd"], ["xabcd"]) == (["xa"], "bc")
    assert feed(["c", "bc"], ["abcd"]) == (["a"], "bc")


def reference(stops: list[str], text: str, include: bool) -> tuple[str, str | None]:
    """Character by character over the whole text."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_borders_of_pieces_never_matter(stops, parts, include):
    out, matched = feed(stops, parts, include)
    assert ("".join(out), matched) == reference(stops, "".join(parts), include)
