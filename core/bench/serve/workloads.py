"""What is asked of a server: prompts with the number of tokens to answer, from a seed, a file or a trace."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from interlace.bench.serve.lengths import Lengths
from interlace.bench.serve.traces import BLOCK_TOKENS, TraceRow, read_trace
from interlace.bench.serve.vocabulary import Vocabulary
from interlace.bench.sharegpt import conversations, select_conversations
from interlace.bench.workloads import WorkloadError, read_items


class ServeItem(msgspec.Struct, frozen=True):
    """One request."""

    prompt: str | list[int]
    """Token ids where the endpoint takes them and the tokenizer is known, else text."""
    max_tokens: int
    """How many tokens are asked for."""


class ServeWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """What one run asks."""

    description: str
    items: list[ServeItem]
    times: list[float] | None = None
    """Of a trace: when each came, in seconds."""


class PromptMaker(msgspec.Struct, frozen=True):
    """Turns pieces of a prompt into what the endpoint takes."""

    vocabulary: Vocabulary
    takes_ids: bool
    """The endpoint takes token ids (`/v1/completions`)."""

    def item(self, places: Sequence[int], max_tokens: int) -> ServeItem:
        """A request of the words at `places`."""
        ids = self.vocabulary.token_ids(places) if self.takes_ids else None
        return ServeItem(self.vocabulary.text(places) if ids is None else ids, max_tokens)


def random_workload(maker: PromptMaker, count: int, *, inputs: Lengths, outputs: Lengths, seed: int) -> ServeWorkload:
    """Prompts of random words."""
    draw = random.Random(seed)
    items = [maker.item(maker.vocabulary.draw(draw, inputs.draw(draw)), outputs.draw(draw)) for _ in range(count)]
    return ServeWorkload(description=f"random prompts, {inputs.text} tokens in and {outputs.text} out", items=items)


def shared_prefix_workload(
    maker: PromptMaker, count: int, *, groups: int, prefix_len: int, inputs: Lengths, outputs: Lengths, seed: int
) -> ServeWorkload:
    """Prompts that begin with one of `groups` prefixes, in random order, and go on with words of their own."""
    draw = random.Random(seed)
    prefixes = [maker.vocabulary.draw(draw, prefix_len) for _ in range(groups)]
    items = []
    for _ in range(count):
        prefix = draw.choice(prefixes)
        suffix = maker.vocabulary.draw(draw, inputs.draw(draw))
        items.append(maker.item(prefix + suffix, outputs.draw(draw)))
    shape = f"{groups} prefixes of {prefix_len} tokens, then {inputs.text} of their own, {outputs.text} out"
    return ServeWorkload(description=f"shared prefixes: {shape}", items=items)


def sharegpt_workload(
    maker: PromptMaker, count: int, *, path: Path | None, outputs: Lengths | None, max_len: int | None, seed: int
) -> ServeWorkload:
    """First turns of ShareGPT conversations; as many tokens out as the reply has, unless `outputs` says otherwise.

    Lengths are in words where the tokenizer is unknown."""
    draw = random.Random(seed)
    chosen = select_conversations(
        list(conversations(path)),
        maker.vocabulary.count,
        count,
        seed=seed,
        max_model_len=max_len,
        output_len=None if outputs is None else lambda: outputs.draw(draw),
    )
    items = [ServeItem(found.prompt, length) for found, length in chosen]
    return ServeWorkload(description="ShareGPT conversations", items=items)


def file_workload(path: Path, count: int | None, outputs: Lengths | None, takes_ids: bool, seed: int) -> ServeWorkload:
    """The requests of a workload file, as `interlace bench throughput --save-workload` writes them."""
    if not takes_ids:
        raise WorkloadError(
            f"{path} holds token ids, which only the completions endpoint takes: --endpoint completions"
        )
    draw = random.Random(seed)
    items = [
        ServeItem(item.prompt_token_ids, item.max_tokens if outputs is None else outputs.draw(draw))
        for item in read_items(path)[:count]
    ]
    return ServeWorkload(description=f"the first requests of {path.name}", items=items)


def trace_workload(
    maker: PromptMaker, count: int | None, *, path: Path, max_len: int | None, length_scale: float, seed: int
) -> ServeWorkload:
    """The requests of a trace, with random words for its prompts: equal where its block hashes are equal.

    `length_scale` multiplies lengths, those of blocks too; requests of more than `max_len` tokens are left out."""

    def scaled(length: int) -> int:
        return max(1, round(length * length_scale))

    def fits(row: TraceRow) -> bool:
        return max_len is None or scaled(row.input_len) + scaled(row.output_len) <= max_len

    rows = read_trace(path, count, fits)
    block = scaled(BLOCK_TOKENS)
    items = []
    for number, row in enumerate(rows):
        places = _trace_prompt(maker.vocabulary, row.hash_ids, block, scaled(row.input_len), seed, number)
        items.append(maker.item(places, scaled(row.output_len)))
    scale = "" if length_scale == 1.0 else f", lengths × {length_scale:g}"
    limit = "" if max_len is None else f", those of at most {max_len} tokens"
    return ServeWorkload(
        description=f"the trace {path.name}{scale}{limit}", items=items, times=[row.time_s for row in rows]
    )


def _trace_prompt(
    vocabulary: Vocabulary, hash_ids: Sequence[int], block: int, length: int, seed: int, number: int
) -> list[int]:
    """The blocks that the hashes stand for, each drawn from its own hash; what no hash covers is the request's own."""
    places: list[int] = []
    for hash_id in hash_ids:
        if len(places) >= length:
            break
        places += vocabulary.draw(random.Random(f"{seed}:block:{hash_id}"), block)
    own = length - len(places)
    if own > 0:
        places += vocabulary.draw(random.Random(f"{seed}:request:{number}"), own)
    return places[:length]
