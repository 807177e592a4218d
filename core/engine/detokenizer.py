"""Incremental detokenisation: token ids in, text out, never half a character.

The texts pushed out of one stream, joined, equal the decoding of all its ids at once. Most tokenizers decode by
concatenating bytes: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece with byte fallback (Llama 2, Gemma). For
these a token is a few bytes looked up in a table, and a UTF-8 decoder holds back what is not yet a character. Any other
decoder is served by decoding a short window again at each token.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from interlace.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character."""
MAX_PENDING_TOKENS = 16
"""A window that still ends in half a character after so many tokens never will be one: a character has 4 bytes."""


class TextStream(ABC):
    """The text of one growing sequence of tokens."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain, possibly empty."""

    def push_all(self, token_ids: Iterable[int]) -> str:
        """Add several tokens at once: the texts that `push` would have returned, joined."""
        return "".join(map(self.push, token_ids))

    @abstractmethod
    def flush(self) -> str:
        """The end: return what was held back, with `REPLACEMENT` for bytes that never became a character."""


class Detokenizer:
    """Makes text streams for one tokenizer. Thread-safe: shared tables only ever gain equal entries."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._texts: dict[int, str] = {}
        # The decoder alone: the text form of a whole tokenizer takes a second for 262,144 tokens.
        decoder = json.loads(tokenizer.backend.decoder.__getstate__()) if tokenizer.backend.decoder else None
        self._byte_level = _BytePieces(tokenizer) if _is_byte_level(decoder) else None
        rule = _fallback_rule(decoder)
        self._fallback = _FallbackPieces(tokenizer, *rule[:2]) if rule else None
        self._leading_spaces = rule[2] if rule else 0

    def stream(self, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True) -> TextStream:
        """A fresh stream. Without `spaces_between_special_tokens`, special tokens are written as they are, where the
        tokenizer's decoder would set spaces around them (byte-wise decoders never do)."""
        skipped: Collection[int] = self._special if skip_special_tokens else ()
        if self._byte_level is not None:
            return _ByteLevelStream(self._byte_level, skipped)
        if self._fallback is not None:
            return _ByteFallbackStream(self._fallback, skipped, self._leading_spaces)
        verbatim = self._special if not skip_special_tokens and not spaces_between_special_tokens else frozenset()
        return _WindowStream(self._tokenizer, skip_special_tokens, verbatim)

    def token_text(self, token_id: int) -> str:
        """One token as it reads in the middle of a text; for lists of log probabilities."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.token_text(token_id)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for: also those of a part of a character, which `token_text` cannot show."""
        if self._byte_level is not None:
            return self._byte_level[token_id]
        if self._fallback is not None:
            piece = self._fallback[token_id]
            return bytes([piece]) if isinstance(piece, int) else piece.encode()
        return self.token_text(token_id).encode()


# ── Byte-level BPE ──────────────────────────────────────────────────────────────────────────────────────────────


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    chain = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [step["type"] for step in chain] == ["ByteLevel"]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class _BytePieces(dict[int, bytes]):
    """Token id → its bytes, filled on demand. Ids beyond the vocabulary (padding of the embedding) have none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = _byte_of_char()

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.backend.id_to_token(token_id) or ""
        if all(char in self._bytes for char in token):
            piece = bytes(self._bytes[char] for char in token)
        else:  # an added token outside the alphabet stands for itself
            piece = token.encode()
        self[token_id] = piece
        return piece


class _ByteLevelStream(TextStream):
    def __init__(self, pieces: _BytePieces, skipped: Collection[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decode(self._pieces[token_id])

    def push_all(self, token_ids: Iterable[int]) -> str:
        pieces, skipped = self._pieces, self._skipped
        return self._decode(b"".join([pieces[token_id] for token_id in token_ids if token_id not in skipped]))

    def flush(self) -> str:
        return self._decode(b"", True)


# ── SentencePiece with byte fallback ────────────────────────────────────────────────────────────────────────────


def _fallback_rule(decoder: dict[str, Any] | None) -> tuple[str, str, int] | None:
    """(mark, its text, leading spaces to strip) of a decoder Replace → ByteFallback → Fuse (→ Strip), else None."""
    chain = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else []
    if [step["type"] for step in chain[:3]] != ["Replace", "ByteFallback", "Fuse"] or "String" not in chain[0][
        "pattern"
    ]:
        return None
    strip: dict[str, Any] = chain[3] if len(chain) == 4 else {"type": "Strip", "content": " ", "start": 0, "stop": 0}
    if len(chain) > 4 or strip["type"] != "Strip" or strip["content"] != " " or strip["stop"]:
        return None
    return chain[0]["pattern"]["String"], chain[0]["content"], strip["start"]


class _FallbackPieces(dict[int, str | int]):
    """Token id → its text, or its value where it stands for a single byte; filled on demand."""

    def __init__(self, tokenizer: Tokenizer, mark: str, text: str) -> None:
        self._tokenizer = tokenizer
        self._mark, self._text = mark, text

    def __missing__(self, token_id: int) -> str | int:
        token = self._tokenizer.backend.id_to_token(token_id) or ""
        piece: str | int = token.replace(self._mark, self._text)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            piece = int(token[3:5], 16)
        self[token_id] = piece
        return piece


class _ByteFallbackStream(TextStream):
    """Decoders of this kind judge a run of byte tokens as a whole: one bad byte makes every byte of the run
    `REPLACEMENT`. The stream does the same from the bad byte on, but does not take back characters it has given out."""

    def __init__(self, pieces: _FallbackPieces, skipped: Collection[int], leading_spaces: int) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._strip = leading_spaces
        self._held = bytearray()
        self._bad_run = False

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._pieces[token_id]
        if isinstance(piece, int):
            return self._strip_leading(self._push_byte(piece))
        return self._strip_leading(self._end_run() + piece) if piece else ""

    def flush(self) -> str:
        return self._end_run()

    def _push_byte(self, byte: int) -> str:
        self._held.append(byte)
        if not self._bad_run:
            try:
                text = self._held.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return ""
                self._bad_run = True
            else:
                self._held.clear()
                return text
        text = REPLACEMENT * len(self._held)
        self._held.clear()
        return text

    def _end_run(self) -> str:
        text = REPLACEMENT * len(self._held)
        self._held.clear()
        self._bad_run = False
        return text

    def _strip_leading(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


# ── Any other decoder ───────────────────────────────────────────────────────────────────────────────────────────


class _WindowStream(TextStream):
    """Decodes a window: the tokens of the last text given out, for context, and those after it."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, verbatim: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._verbatim = verbatim
        self._window: list[int] = []
        self._context = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        if token_id in self._verbatim:
            before = self.flush()
            self._window, self._context, self._context_text = [], 0, ""
            return before + self._tokenizer.decode([token_id], skip_special_tokens=False)
        self._window.append(token_id)
        text = self._decode(self._window)
        pending = len(self._window) - self._context
        if text.endswith(REPLACEMENT) and pending < MAX_PENDING_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        new_text = text[len(self._context_text) :]
        if new_text or len(self._window) - self._context >= MAX_PENDING_TOKENS:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._context_text = self._decode(self._window)
        return new_text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=self._skip)


# ── Stop strings ────────────────────────────────────────────────────────────────────────────────────────────────


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces, whatever the borders of the pieces.

    The first is the one that is complete first; of several complete at the same character, the longest. Text is held
    back only as far as a stop string could still begin in it.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = stops
        self._include = include_in_output
        self._longest = max(map(len, stops))
        self._first_chars = {stop[0] for stop in stops}
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what may be given out. After a match (`matched` is set) nothing more comes out."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        keep = len(text) - self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The end: return the text that was held back."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        tail = text[max(0, len(text) - self._longest + 1) :]
        for start, char in enumerate(tail):
            if char in self._first_chars and any(stop.startswith(tail[start:]) for stop in self._stops):
                return len(tail) - start
        return 0
