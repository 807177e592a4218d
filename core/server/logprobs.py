"""Log probabilities in the forms that chats and completions have for them."""

from __future__ import annotations

import codecs
from collections.abc import Collection

from interlace.engine.detokenizer import Detokenizer
from interlace.messages import Logprob
from interlace.server.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from interlace.server.generation import clamped


class TokenNames:
    """What tokens are called in an answer."""

    def __init__(self, detokenizer: Detokenizer, as_ids: bool) -> None:
        """`as_ids`: `token_id:123`, which is unique, where texts are not."""
        self._detokenizer = detokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._detokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> bytes:
        return self._detokenizer.token_bytes(token_id)

    def chat(self, entries: list[dict[int, Logprob]], top: int) -> ChatLogprobs:
        """`entries` of new tokens, the chosen token first in each; with the `top` most likely ones."""
        return ChatLogprobs([self._chat_token(entry, top) for entry in entries])

    def _chat_token(self, entry: dict[int, Logprob], top: int) -> TokenLogprob:
        chosen, found = next(iter(entry.items()))
        likely = sorted((rank, token) for token, one in entry.items() if (rank := one.rank or 0) <= top)
        tops = [TopLogprob(self.name(token), clamped(entry[token]), [*self.bytes(token)]) for _, token in likely]
        return TokenLogprob(self.name(chosen), clamped(found), [*self.bytes(chosen)], tops[:top])


class CompletionColumns:
    """The columns of one choice. Keeps the place in the text, so that a stream's offsets go on."""

    def __init__(self, names: TokenNames, skipped: Collection[int]) -> None:
        """`skipped`: tokens that take no place in the text."""
        self._names = names
        self._skipped = skipped
        self._offset = 0
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token_ids: list[int], entries: list[dict[int, Logprob] | None]) -> CompletionLogprobs:
        """Columns of the next tokens; `entries[i]` belongs to `token_ids[i]`, None where nothing predicts it."""
        columns = CompletionLogprobs([], [], [], [])
        for token, entry in zip(token_ids, entries, strict=True):
            columns.text_offset.append(self._offset)
            if token not in self._skipped:
                self._offset += len(self._decode(self._names.bytes(token)))
            columns.tokens.append(self._names.name(token))
            columns.token_logprobs.append(None if entry is None else clamped(entry[token]))
            columns.top_logprobs.append(None if entry is None else self._tops(entry))
        return columns

    def _tops(self, entry: dict[int, Logprob]) -> dict[str, float]:
        tops: dict[str, float] = {}
        for token, found in entry.items():  # of two tokens with one name, the chosen or more likely one counts
            tops.setdefault(self._names.name(token), clamped(found))
        return tops
