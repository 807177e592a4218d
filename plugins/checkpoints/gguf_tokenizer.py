"""From the vocabulary in a GGUF file to a tokenizer: byte-level BPE (`gpt2`) and sentencepiece BPE (`llama`).

The rules follow llama.cpp's description of the metadata; where a file leaves something to the reader, the choice
that the models' own tokenizers make is taken.
"""

from __future__ import annotations

from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from interlace.errors import CheckpointError, did_you_mean
from interlace.plugins.checkpoints.gguf_reader import GgufFile
from interlace.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # of tokenizer.ggml.token_type
_SPACE = "▁"
_LONGEST_PIECE = 1024  # sentencepiece makes pieces of 16 characters, or a few times that

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Split(msgspec.Struct, frozen=True):
    """How one value of `tokenizer.ggml.pre` cuts text before the merges."""

    pattern: str
    digits: bool = False
    """Every digit is cut off first, on its own."""
    whole_words: bool = False
    """A piece that is in the vocabulary is taken as it is, without merges."""
    add_bos: bool = False
    nfc: bool = False


_SPLITS = {
    "gpt-2": _Split(_GPT2),
    "default": _Split(_GPT2),
    "smollm": _Split(_GPT2, digits=True),
    "starcoder": _Split(_GPT2, digits=True),
    "refact": _Split(_GPT2, digits=True),
    "llama-bpe": _Split(_LLAMA3, whole_words=True, add_bos=True),
    "llama3": _Split(_LLAMA3, whole_words=True, add_bos=True),
    "llama-v3": _Split(_LLAMA3, whole_words=True, add_bos=True),
    "smaug-bpe": _Split(_LLAMA3),
    "qwen2": _Split(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Split(_QWEN2, nfc=True, add_bos=True),
    "tekken": _Split(_TEKKEN, whole_words=True, add_bos=True),
}

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>")


class _Pieces:
    """The tokenizer metadata of a file, checked."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.tokens: list[str] = self.items("tokens", str)
        if not self.tokens:
            raise self.error("tokens is missing; the file holds no vocabulary")
        self.types: list[int] = self.items("token_type", int) or [1] * len(self.tokens)
        self.scores: list[float] = self.items("scores", float) or [0.0] * len(self.tokens)
        for key, values in (("token_type", self.types), ("scores", self.scores)):
            if len(values) != len(self.tokens):
                raise self.error(f"{key} has {len(values)} entries for {len(self.tokens)} tokens")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """`tokenizer.ggml.<key>`, of exactly that type."""
        value = self.file.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            raise self.error(f"{key} is {value!r}; a value of type {kind.__name__} is expected")
        return value

    def items(self, key: str, kind: type) -> list[Any]:
        values: list[Any] = self.get(key, list, None) or []
        if values and type(values[0]) is not kind:  # GGUF arrays have one type
            raise self.error(f"{key} must be a list of {kind.__name__}")
        return values

    def token_id(self, key: str) -> int | None:
        """A token id that exists, or None if the file gives none."""
        index: int | None = self.get(key, int, None)
        if index is not None and not 0 <= index < len(self.tokens):
            raise self.error(f"{key} is {index}, outside the vocabulary of {len(self.tokens)} tokens")
        return index

    def chat_template(self) -> str | None:
        template = self.file.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"{self.file.path}: tokenizer.chat_template is not a text")
        return template

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: tokenizer.ggml.{problem}")


def read_eos_token_ids(file: GgufFile) -> list[int]:
    """Every token that ends an answer: EOS, end of turn, end of message, and what the file's own chat template writes
    at the end of a turn (older converters left that out)."""
    pieces = _Pieces(file)
    found = [pieces.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    template = pieces.chat_template() or ""
    for text in _END_OF_TURN:
        if text in template and text in pieces.tokens:
            index = pieces.tokens.index(text)
            found.append(index if pieces.types[index] in (_CONTROL, _USER_DEFINED) else None)
    return list(dict.fromkeys(index for index in found if index is not None))


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """Build the tokenizer. Raises `CheckpointError` naming the key that is missing, unknown or malformed."""
    pieces = _Pieces(file)
    kind = pieces.get("model", str, "")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise pieces.error(f"model is {kind!r}; known: {', '.join(builders)}")
    try:
        backend = builders[kind](pieces)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{file.path}: the vocabulary is malformed: {error}") from error
    _add_special_tokens(backend, pieces)
    named = {
        f"{name}_token": pieces.tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator"))
        if (index := pieces.token_id(f"{key}_token_id")) is not None
    }
    return Tokenizer(
        backend,
        name=str(file.metadata.get("general.name") or file.path.name),
        bos_token_id=pieces.token_id("bos_token_id"),
        eos_token_ids=read_eos_token_ids(file),
        special_tokens=named,
        chat_template=pieces.chat_template(),
    )


def _byte_level(pieces: _Pieces) -> tokenizers.Tokenizer:
    name = pieces.get("pre", str, "default")
    if name not in _SPLITS:
        raise pieces.error(
            f"pre is {name!r}, a way of cutting text that is not known here (known: {', '.join(_SPLITS)})."
            f"{did_you_mean(name, _SPLITS)} Use the model's safetensors directory with its tokenizer.json instead"
        )
    split = _SPLITS[name]
    merges = []
    for line in pieces.items("merges", str):
        left, separator, right = line.partition(" ")
        if not separator or not left or not right:
            raise pieces.error(f"merges has the entry {line!r}; two tokens with a space between are expected")
        merges.append((left, right))
    vocabulary = {token: index for index, token in enumerate(pieces.tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole_words))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    cuts.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=pieces.get("add_space_prefix", bool, False), use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    _add_framing(backend, pieces, add_bos=split.add_bos)
    return backend


def _sentencepiece(pieces: _Pieces) -> tokenizers.Tokenizer:
    unknown = pieces.token_id("unknown_token_id")
    # The file has spaces where the vocabulary has sentencepiece's visible ones.
    tokens = [_SPACE * len(token) if token.strip(" ") == "" else token for token in pieces.tokens]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_derive_merges(tokens, vocabulary, pieces),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=_BYTE in pieces.types,
        )
    )
    replace = normalizers.Replace(" ", _SPACE)
    decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.get("add_space_prefix", bool, True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(decode)
    _add_framing(backend, pieces, add_bos=True)
    return backend


def _derive_merges(tokens: list[str], vocabulary: dict[str, int], pieces: _Pieces) -> list[tuple[str, str]]:
    """Merges from scores: sentencepiece joins the two neighbours whose union has the best score; every way to cut a
    token in two is one merge of its rank. Runs of spaces are its user-defined pieces, joined before all others."""

    def rank(index: int) -> tuple[bool, float, int]:
        return pieces.types[index] != _USER_DEFINED, -pieces.scores[index], index

    skipped = (_CONTROL, _BYTE)
    merges = []
    for index in sorted((i for i in range(len(tokens)) if pieces.types[i] not in skipped), key=rank):
        token = tokens[index]
        if len(token) > _LONGEST_PIECE:
            raise pieces.error(f"tokens has an entry of {len(token)} characters; the file is corrupt")
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in vocabulary and token[cut:] in vocabulary:
                merges.append((token[:cut], token[cut:]))
    return merges


def _add_special_tokens(backend: tokenizers.Tokenizer, pieces: _Pieces) -> None:
    """Control and user-defined tokens are found in the text before everything else."""
    vocabulary_size = backend.get_vocab_size()
    named = {pieces.token_id(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding", "unknown")}
    added = []
    for index, (token, kind) in enumerate(zip(pieces.tokens, pieces.types, strict=True)):
        special = kind == _CONTROL or index in named
        if token and (special or kind == _USER_DEFINED) and backend.token_to_id(token) is not None:
            added.append(AddedToken(token, normalized=False, special=special))
    backend.add_tokens(added)
    if backend.get_vocab_size() != vocabulary_size:
        raise pieces.error("tokens has special tokens that are not in the vocabulary")


def _add_framing(backend: tokenizers.Tokenizer, pieces: _Pieces, add_bos: bool) -> None:
    """BOS in front and EOS behind a prompt, if the file wants them; `add_bos` is the tokenizer's own default."""
    bos, eos = pieces.token_id("bos_token_id"), pieces.token_id("eos_token_id")
    frame, special = ["$A"], []
    if bos is not None and pieces.get("add_bos_token", bool, add_bos):
        frame.insert(0, pieces.tokens[bos])
        special.append((pieces.tokens[bos], bos))
    if eos is not None and pieces.get("add_eos_token", bool, False):
        frame.append(pieces.tokens[eos])
        special.append((pieces.tokens[eos], eos))
    if special:
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
