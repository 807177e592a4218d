"""`Tokenizer`: text to token ids and back, over the `tokenizers` library alone.

transformers is not needed (its import costs more than a second) except to convert a directory that has no
`tokenizer.json`. Instances are immutable and thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from interlace.chat_template import ChatTemplate
from interlace.clock import local_time
from interlace.errors import CheckpointError, InvalidRequestError
from interlace.model_config import read_json

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model")


class Tokenizer:
    """A vocabulary with its special tokens and chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        name: str = "the model",
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        now: Callable[[], datetime] = local_time,
    ) -> None:
        """`special_tokens` maps names such as `bos_token` to texts, for the chat template. `name` is for errors.

        `backend` belongs to the instance from now on; padding and truncation are switched off in it."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        """The `tokenizers.Tokenizer`, for incremental decoding; must not be changed."""
        self.name = name
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        """Tokens that end a generation."""
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        """Tokens of the vocabulary; the model's embedding may have more rows."""
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        """Control tokens: left out of text by `skip_special_tokens`."""
        self.chat_template = chat_template
        self._now = now

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Load a Hugging Face style directory. Raises `CheckpointError` naming file, cause and cure."""
        config = _read_optional(path / "tokenizer_config.json")
        special_tokens = _read_special_tokens(path, config)
        backend = _load_backend(path)
        _add_missing_tokens(backend, config, path)
        backend.add_special_tokens([t for t in special_tokens.values() if backend.token_to_id(t) is not None])
        bos = special_tokens.get("bos_token")
        return cls(
            backend,
            name=path.name,
            bos_token_id=None if bos is None else backend.token_to_id(bos),
            eos_token_ids=_read_eos(path, backend, special_tokens),
            special_tokens=special_tokens,
            chat_template=_read_chat_template(path, config),
        )

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        return Tokenizer(
            self.backend,
            name=self.name,
            bos_token_id=self.bos_token_id,
            eos_token_ids=self.eos_token_ids,
            special_tokens=self.special_tokens,
            chat_template=source,
            now=self._now,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` as a whole prompt (e.g. after a BOS token).

        Raises `InvalidRequestError` if `text` is not valid Unicode text."""
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:
            raise InvalidRequestError(f"a prompt must be valid Unicode text: {error}") from error
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary are left out, halves of characters become U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """The text one token adds in the middle of a text; special tokens as they are written."""
        # Some decoders drop the space in front of a text, hence a token before it.
        anchor, prefix = self._anchor
        text: str = self.backend.decode([*anchor, token_id], skip_special_tokens=False)
        return text[len(prefix) :]

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        ids = self.encode("a", add_special_tokens=False)
        return ids, self.decode(ids, skip_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt text of a conversation, special tokens included. `extra` are further template variables.

        Raises `InvalidRequestError` when there is no chat template, or template or messages are wrong."""
        return self._template.render(messages, add_generation_prompt, **extra)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """Token ids of a conversation. The template writes the special tokens, so none are added."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **extra), add_special_tokens=False)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InvalidRequestError(
                f"model '{self.name}' has no chat template (it may be a base model). Give one with "
                "`--chat-template FILE` (setting `chat_template`), or send completion-style prompts"
            )
        return ChatTemplate(self.chat_template, self.special_tokens, self._now, f"model '{self.name}'")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{file}: not a readable tokenizer file ({error}); it may be truncated or corrupt: fetch it again"
            ) from error
    slow = next((path / name for name in _SLOW_FILES if (path / name).is_file()), None)
    if slow is None:
        raise CheckpointError(f"{path}: no tokenizer.json; copy the tokenizer files of the model into this directory")
    return _convert(slow)


def _convert(slow: Path) -> tokenizers.Tokenizer:
    """Only for directories without tokenizer.json: transformers knows how to convert the older formats."""
    try:
        from transformers import AutoTokenizer

        converted: tokenizers.Tokenizer = AutoTokenizer.from_pretrained(str(slow.parent)).backend_tokenizer
    except Exception as error:
        raise CheckpointError(
            f"{slow}: there is no tokenizer.json beside it, and transformers could not convert it "
            f"({type(error).__name__}: {error}); fetch a tokenizer.json, or install sentencepiece and protobuf"
        ) from error
    return converted


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], path: Path) -> None:
    """Some models list added tokens in tokenizer_config.json only."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    try:
        entries = sorted((int(index), dict(entry)) for index, entry in listed.items())
        missing = [(index, entry) for index, entry in entries if backend.token_to_id(entry["content"]) is None]
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: added_tokens_decoder is malformed: {error}"
        ) from error
    for index, entry in missing:
        flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        token = tokenizers.AddedToken(entry["content"], special=bool(entry.get("special", False)), **flags)
        backend.add_tokens([token])
        if backend.token_to_id(entry["content"]) != index:
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: added token {entry['content']!r} should have id {index}, but the "
                "vocabulary of tokenizer.json ends elsewhere; the two files do not belong together"
            )


def _read_special_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens; a token is a string, or an object with `content`."""
    named = {**_read_optional(path / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    found = {}
    for name in _NAMED_TOKENS:
        token = named.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _read_eos(path: Path, backend: tokenizers.Tokenizer, special_tokens: dict[str, str]) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else the tokenizer's own EOS token."""
    for name in ("generation_config.json", "config.json"):
        eos = _read_optional(path / name).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [eos]
        if ids and all(isinstance(index, int) for index in ids):
            return tuple(ids)
    index = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return () if index is None else (index,)


def _read_chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json (of several, the one named default)."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise CheckpointError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    template = _read_optional(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
