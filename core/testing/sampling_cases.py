"""Random cases of `Kernels.sample` and `Kernels.logprobs`, and what they have to give for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from interlace.sampling.device import LogprobColumns, SamplingColumns, SamplingMode
from interlace.sampling.distribution import Shape, final_probabilities
from interlace.sampling.params import MAX_LOGPROBS
from interlace.sampling.random import uniform

Sample = Callable[[torch.Tensor, SamplingColumns, SamplingMode], torch.Tensor]
Logprobs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], LogprobColumns]

_TOLERANCE = 1e-5
"""How far, in probability, rounding may move the border between two tokens."""


def arguments(rows: int, vocab: int, generator: torch.Generator, device: str) -> dict[str, Any]:
    """Arguments of `Kernels.sample` for rows of all kinds."""
    source = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    shapes = [_shape(source, SamplingMode.TRUNCATED) for _ in range(rows)]
    return {
        "logits": (torch.randn(rows, vocab, generator=generator) * 4).to(device),
        "columns": columns_of(shapes, *_sources(source, rows), device),
        "mode": SamplingMode.TRUNCATED,
    }


def columns_of(
    shapes: list[Shape], seeds: list[int], sample_indices: list[int], positions: list[int], device: str
) -> SamplingColumns:
    """The columns of rows with these shapes, seeds of 64 bits, sample indices and output positions."""

    def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return SamplingColumns(
        temperature=column([shape.temperature for shape in shapes], torch.float32),
        top_k=column([shape.top_k for shape in shapes], torch.int32),
        top_p=column([shape.top_p for shape in shapes], torch.float32),
        min_p=column([shape.min_p for shape in shapes], torch.float32),
        seed=column([seed - (1 << 64) if seed >= 1 << 63 else seed for seed in seeds], torch.int64),
        sample_index=column(sample_indices, torch.int64),
        position=column(positions, torch.int64),
    )


def check_sample(sample: Sample, device: str, seed: int) -> None:
    """Raise `AssertionError` if `sample` chooses what it must not, for cases that follow from `seed`."""
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for most in SamplingMode:
        rows, vocab = source.choice([1, 7, 33, 70]), source.choice([1, 5, 130, 1000, 3001])
        shapes = [_shape(source, most) for _ in range(rows)]
        seeds, indices, positions = _sources(source, rows)
        columns = columns_of(shapes, seeds, indices, positions, device)
        logits = torch.randn(rows, vocab, generator=generator) * source.choice([0.5, 2.0, 12.0])
        logits[:, vocab // 2 :] = logits[:, : vocab - vocab // 2].clone()  # every value twice: the first one counts
        bad = _spoil(logits, source)
        given, chances = logits.to(device), final_probabilities(logits, shapes)
        for mode in SamplingMode:
            if mode < most:
                continue
            passed = given.clone()
            tokens = sample(passed, columns, mode)
            case = f"sample of {rows} rows of {vocab} logits in mode {mode.name}"
            assert torch.equal(passed.view(torch.int32), given.view(torch.int32)), f"{case}: wrote into the logits"
            assert (tokens.shape, tokens.dtype) == ((rows,), torch.int64), f"{case}: {tokens.dtype} {tokens.shape}"
            assert tokens.device == given.device, f"{case}: tokens on {tokens.device}"
            chosen = tokens.tolist()
            numbers = uniform(seeds, indices, positions)
            for row, token in enumerate(chosen):
                what = f"{case}: row {row}, {shapes[row]}, seed {seeds[row]}, position {positions[row]}"
                if row in bad:
                    assert token == -1, f"{what}: token {token} of a row that is no distribution"
                else:
                    _check_token(logits[row], chances[row], shapes[row].temperature, token, numbers[row], what)


def _check_token(
    logits: torch.Tensor, chances: torch.Tensor, temperature: float, token: int, number: float, what: str
) -> None:
    assert 0 <= token < len(logits), f"{what}: token {token}"
    if temperature == 0.0:
        best = int(logits.numpy().argmax())
        assert token == best, f"{what}: token {token} instead of {best}, the first of the largest"
        return
    end = chances.cumsum(0)
    start = float(end[token] - chances[token])
    assert chances[token] > 0, f"{what}: token {token} is excluded"
    assert start - _TOLERANCE <= number <= float(end[token]) + _TOLERANCE, (
        f"{what}: token {token} holds {start:.6f} to {float(end[token]):.6f}, the number is {number:.6f}"
    )


def logprob_arguments(rows: int, vocab: int, generator: torch.Generator, device: str) -> dict[str, Any]:
    """Arguments of `Kernels.logprobs` for rows that ask for everything."""
    return {
        "logits": (torch.randn(rows, vocab, generator=generator) * 4).to(device),
        "token_ids": torch.randint(vocab, (rows,), generator=generator).to(device),
        "counts": torch.full((rows,), MAX_LOGPROBS, dtype=torch.int32, device=device),
    }


def check_logprobs(
    logprobs: Logprobs, device: str, seed: int, vocab_sizes: Sequence[int] = (1, 5, 130, 5000, 9001)
) -> None:
    """Raise `AssertionError` if `logprobs` reports what is not so, for cases that follow from `seed`."""
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, vocab = source.choice([1, 7, 33]), source.choice(vocab_sizes)
    wide = torch.randn(rows, vocab + 3, generator=generator) * source.choice([0.5, 4.0, 30.0])
    wide += source.choice([0.0, -200.0, 1e4])
    for row in range(0, rows, 4):
        wide[row, :vocab] = wide[row, :vocab].round()  # many equal ones
        wide[row, source.randrange(vocab) : vocab - 1] = -torch.inf
    logits = wide.to(device)[:, :vocab]
    tokens = torch.tensor([source.choice([-1, source.randrange(vocab), int(row[:vocab].argmax())]) for row in wide])
    counts = torch.tensor([source.choice([-1, 0, 1, 5, MAX_LOGPROBS]) for _ in range(rows)], dtype=torch.int32)
    before = logits.clone()
    found = logprobs(logits, tokens.to(device), counts.to(device))
    case = f"logprobs of {rows} rows of {vocab} logits, seed {seed}"
    entries = 1 + min(MAX_LOGPROBS, vocab)
    shapes = [(part.shape, part.dtype) for part in found]
    wanted: list[Any] = [((rows, entries), torch.int64), ((rows, entries), torch.float32), ((rows,), torch.int64)]
    assert shapes == wanted, f"{case}: {shapes}"
    assert torch.equal(logits, before), f"{case}: wrote into the logits"
    right = torch.log_softmax(wide[:, :vocab].double(), 1)
    for row, (token, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True)):
        if token >= 0 and count >= 0:
            own = [part[row].tolist() for part in found]
            _check_report(right[row], token, min(count, vocab), own, f"{case}, row {row}")


def _check_report(right: torch.Tensor, token: int, count: int, found: list[Any], what: str) -> None:
    """`right` [vocab]: the log probabilities in float64."""
    ids, values, rank = found
    ids, values = ids[: 1 + count], values[: 1 + count]
    assert ids[0] == token, f"{what}: entry 0 is token {ids[0]}, chosen was {token}"
    wanted = right[ids]
    slack = 1e-5 + 1e-6 * right[right.isfinite()].abs().max()  # as float32 rounds differences of logits
    errors = torch.where(wanted.isinf(), 0.0, (torch.tensor(values).double() - wanted).abs())
    same = [value == -torch.inf for value in values] == wanted.isinf().tolist()
    assert same and bool((errors <= slack).all()), f"{what}: {values} instead of {wanted.tolist()}"
    best = right.sort(descending=True).values[:count]
    assert len(set(ids[1:])) == count, f"{what}: tokens {ids[1:]}, some of them twice"
    assert torch.equal(wanted[1:].nan_to_num(), best.nan_to_num()) or bool(
        (wanted[1:].nan_to_num() - best.nan_to_num()).abs().max() <= slack
    ), f"{what}: {ids[1:]} are not the most likely"
    least, most = (int((right > right[token] + distance).sum()) + 1 for distance in (slack, -slack))
    assert least <= rank <= most, f"{what}: rank {rank}, should be {least}"


def _shape(source: random.Random, most: SamplingMode) -> Shape:
    if most is SamplingMode.GREEDY or source.random() < 0.2:
        return Shape(temperature=0.0)
    temperature = source.choice([1.0, 1.0, 0.7, 1.9, 1e-7, 50.0])
    if most is SamplingMode.RANDOM:
        return Shape(temperature)
    return Shape(
        temperature, source.choice([0, 0, 1, 2, 40, 10**6]), source.choice([1.0, 0.9, 0.3]), source.choice([0.0, 0.1])
    )


def _sources(source: random.Random, rows: int) -> tuple[list[int], list[int], list[int]]:
    """Seeds, sample indices, output positions."""
    seeds = [source.choice([source.randrange(1 << 64), source.randrange(100), (1 << 64) - 1]) for _ in range(rows)]
    return seeds, [source.randrange(5) for _ in range(rows)], [source.randrange(1 << 17) for _ in range(rows)]


def _spoil(logits: torch.Tensor, source: random.Random) -> set[int]:
    """Make some rows no distribution, others hold -inf; returns the former."""
    bad = set()
    for row in range(len(logits)):
        kind = source.randrange(12)
        if kind < 3:
            logits[row, source.randrange(logits.shape[1])] = (torch.nan, torch.inf, -torch.inf)[kind]
        if kind == 3:
            logits[row] = -torch.inf
        if not logits[row].amax().isfinite():
            bad.add(row)
    return bad
