"""What random prompts are made of: words that are one token each, so that a prompt has the length it should have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from interlace.errors import InterlaceError
from interlace.tokenizer import Tokenizer

MAX_WORDS = 4096
_LEAST_WORDS = 64

# Each is one token of the usual byte-pair vocabularies when a space stands before it.
COMMON_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
one you were her all she there would their we him been has when who will more no if out so said what up its about
into than them can only other new some could time these two may then do first any my now such like our over man
me even most made after also did many before must through back years where much your way well down should because
each just those people how too little state good very make world still own see men work long get here between
both life being under never day same another know while last might us great old year off come since against go
came right used take three
"""


class Vocabulary(msgspec.Struct, frozen=True):
    """Words, each with the space before it, and their token ids if a tokenizer is at hand."""

    words: Sequence[str]
    ids: Sequence[int] | None = None
    tokenizer: Tokenizer | None = None

    def count(self, text: str) -> int:
        """Tokens of `text`; without a tokenizer, its words."""
        return len(self.tokenizer.encode(text)) if self.tokenizer is not None else len(text.split())

    def draw(self, draw: random.Random, length: int) -> list[int]:
        """`length` random places in `words`: a piece of a prompt."""
        return draw.choices(range(len(self.words)), k=length)

    def text(self, places: Sequence[int]) -> str:
        """The words at `places`, as text of as many tokens."""
        return "".join(self.words[place] for place in places)

    def token_ids(self, places: Sequence[int]) -> list[int] | None:
        """The same as token ids, or None without a tokenizer."""
        return None if self.ids is None else [self.ids[place] for place in places]


def common_words() -> Vocabulary:
    """For a server whose tokenizer is not here: common English words, about one token each."""
    return Vocabulary([f" {word}" for word in COMMON_WORDS.split()])


def words_of(tokenizer: Tokenizer) -> Vocabulary:
    """Lower-case words of the vocabulary that read back as the one token they are. Raises `InterlaceError` if there
    are too few of them."""
    words, ids = [], []
    for token in range(tokenizer.vocab_size):
        if token in tokenizer.special_ids:
            continue
        text = tokenizer.token_text(token)
        word = text[1:]
        if not text.startswith(" ") or not (word.isascii() and word.isalpha() and word.islower()):
            continue
        if tokenizer.encode(f"{text}{text}", add_special_tokens=False) == [token, token]:
            words.append(text)
            ids.append(token)
            if len(words) == MAX_WORDS:
                break
    if len(words) < _LEAST_WORDS:
        raise InterlaceError(
            f"the tokenizer '{tokenizer.name}' has only {len(words)} plain words: too few for "
            "random prompts. Use --dataset sharegpt, or --tokenizer none for common English words"
        )
    return Vocabulary(words, ids, tokenizer)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model: a directory with tokenizer.json, or whatever the setting `model` takes.

    Raises what loading that model's tokenizer raises."""
    path = Path(name).expanduser()
    folder = path.parent if path.name == "tokenizer.json" else path
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_directory(folder)
    from interlace.config import load_settings
    from interlace.plugin_manager import PluginManager
    from interlace.resolve import open_tokenizer, resolve

    loaded = load_settings({"model": name}, env={})
    return open_tokenizer(loaded, resolve(loaded, PluginManager(loaded.settings)))
