"""From logits to the distribution a token is drawn from, and the draw itself. Pure functions over rows.

Temperature, then min_p, top_k and top_p, each renormalised over what the one before left. Each of the three is a
threshold on probability, so tokens that tie with the least likely kept one are kept as well: the result does not
depend on the order in which equal tokens happen to be sorted.

Every operation treats each row by itself, with shapes that depend on that row's own parameters or padding that
cannot change a bit: a row gives the same result alone and among any neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

MIN_TEMPERATURE = 1e-6  # dividing float32 logits by less may overflow; the distribution is one token long before
_NUCLEUS_WIDTH = 128  # candidates looked at first for top_p; most nuclei of language models are smaller
_TOP_K_WIDTHS = (64, 256)  # candidates looked at for top_k: the first that leaves room for one more token
_MAX_WIDTH = 256  # from here on, sorting the row is faster
_TOP_BLOCK = 32  # block of the two-stage top-k search
_DRAW_BLOCK = 256  # block of the two-stage inverse CDF


class Shape(NamedTuple):
    """The parameters of one row that shape its distribution; `top_k` 0, `top_p` 1 and `min_p` 0 mean off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Candidates(NamedTuple):
    """The distributions of some rows: everything that has a chance, in ascending order of token id."""

    rows: list[int]
    """Rows of the input; the tensors below have one row for each."""
    token_ids: torch.Tensor | None
    """[rows, candidates] int64, or None when the candidates are the whole vocabulary."""
    weights: torch.Tensor
    """[rows, candidates] float32, proportional to probability; 0 where excluded; NaN where the logits were bad."""


def truncate(logits: torch.Tensor, shapes: Sequence[Shape]) -> Iterator[Candidates]:
    """Apply the shapes of all rows; yields the rows in groups that need the same treatment.

    Only what is asked for is done: without top_k and top_p nothing is searched, with top_k only the k best
    are normalised, and top_p looks at the best few before it looks at more.

    Args:
        logits: [rows, vocab] float32; overwritten.
        shapes: one per row.
    """
    vocab = logits.shape[1]
    if any(shape.temperature != 1.0 for shape in shapes):
        logits.div_(_column([max(shape.temperature, MIN_TEMPERATURE) for shape in shapes], logits))
    if any(shape.min_p > 0.0 for shape in shapes):
        # p < min_p * p_max, in logarithms
        margin = _column([math.log(shape.min_p) if shape.min_p > 0.0 else -math.inf for shape in shapes], logits)
        logits.masked_fill_(logits < logits.amax(dim=1, keepdim=True) + margin, -math.inf)
    whole: list[int] = []
    nuclei: list[int] = []
    limited: dict[int, list[int]] = {}
    for row, shape in enumerate(shapes):
        if 0 < shape.top_k < vocab:
            limited.setdefault(_width_for(shape.top_k), []).append(row)
        elif shape.top_p < 1.0:
            nuclei.append(row)
        else:
            whole.append(row)
    for width, rows in limited.items():
        yield from _search(take_rows(logits, rows), rows, shapes, width, limited=True)
    # The softmax may overwrite the logits: by now nobody else reads these rows.
    if nuclei:
        mass = take_rows(logits, nuclei)
        yield from _search(torch.softmax(mass, dim=1, out=mass), nuclei, shapes, _NUCLEUS_WIDTH, limited=False)
    if whole:
        mass = take_rows(logits, whole)
        yield Candidates(whole, None, torch.softmax(mass, dim=1, out=mass))


def draw(candidates: Candidates, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row: the first, in order of token id, whose cumulative probability exceeds the row's number.

    Args:
        uniforms: [rows of candidates] float64 in [0, 1).

    Returns:
        Token ids [rows] int64, and [rows] bool: whether the row was a distribution at all (else its id means nothing).
    """
    weights = candidates.weights
    if candidates.token_ids is not None:
        index, valid, _ = _invert(weights, uniforms)
        return candidates.token_ids.gather(1, index[:, None]).squeeze(1), valid
    # Find the block first, then the token in it, with the part of the random number that the block left over.
    vocab = weights.shape[1]
    blocks = _blocks(weights, _DRAW_BLOCK, 0.0)  # [rows, blocks, block]
    block, valid, rest = _invert(blocks.sum(dim=2), uniforms)
    inside = blocks[torch.arange(len(block), device=block.device), block]
    offset, _, _ = _invert(inside, rest)
    return (block * _DRAW_BLOCK + offset).clamp_(max=vocab - 1), valid


def draw_rows(
    logits: torch.Tensor, rows: list[int], shapes: Sequence[Shape], uniforms: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """The reference of `Kernels.draw`: one token for each of `rows`, -1 where a row is no distribution."""
    drawn = np.full(len(rows), -1, dtype=np.int64)
    numbers = torch.from_numpy(uniforms).to(logits.device)
    for group in truncate(take_rows(logits, rows), shapes):
        token_ids, valid = draw(group, numbers[group.rows])
        drawn[group.rows] = torch.where(valid, token_ids, -1).cpu().numpy()
    return drawn


def final_probabilities(logits: torch.Tensor, shapes: Sequence[Shape]) -> torch.Tensor:
    """The distributions that `draw` draws from, as [rows, vocab] float64; `logits` is left as it is."""
    result = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    for rows, token_ids, weights in truncate(logits.clone(), shapes):
        probabilities = weights.double()
        probabilities /= probabilities.sum(dim=1, keepdim=True)
        if token_ids is None:
            result[rows] = probabilities
        else:
            # added, not stored: padding repeats the last token id with probability 0
            result[rows] = torch.zeros_like(result[rows]).scatter_add_(1, token_ids, probabilities)
    return result


def take_rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows: the tensor itself when it is all of them, else a copy."""
    if len(rows) == logits.shape[0]:
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))


def _search(
    mass: torch.Tensor, rows: list[int], shapes: Sequence[Shape], width: int, limited: bool
) -> Iterator[Candidates]:
    """Rows with top_k (`limited`; `mass` holds logits) or only top_p (`mass` holds probabilities).

    Looks at the `width` most likely tokens, and sorts a row where what is to be kept may reach beyond them.
    """
    top_k = torch.tensor([[shapes[row].top_k] for row in rows], device=mass.device)
    top_p = _column([shapes[row].top_p for row in rows], mass, torch.float64)
    if width <= _MAX_WIDTH:
        weights, token_ids = largest(mass, min(width, mass.shape[1]))  # descending
        if limited:
            weights = torch.softmax(weights.masked_fill(weights < weights.gather(1, top_k - 1), -math.inf), dim=1)
        weights = weights.masked_fill(weights < _least_likely(weights, top_p), 0.0)
        # Where the last candidate is excluded, everything beyond it is as well. Bad rows (NaN) end here, too.
        closed = ~(weights[:, -1] > 0) | (width >= mass.shape[1])
    else:
        closed = torch.zeros(len(rows), dtype=torch.bool, device=mass.device)
    done = closed.tolist()
    if any(done):
        yield _by_token_id([row for row, ok in zip(rows, done, strict=True) if ok], token_ids[closed], weights[closed])
    open_rows = [index for index, ok in enumerate(done) if not ok]
    if open_rows:
        # one at a time: a row and its sorted copy stay in the processor's cache
        sorted_rows = [
            _truncate_sorted(mass[i : i + 1], top_k[i : i + 1], top_p[i : i + 1], limited) for i in open_rows
        ]
        yield Candidates([rows[index] for index in open_rows], None, torch.cat(sorted_rows))


def _truncate_sorted(mass: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, limited: bool) -> torch.Tensor:
    """The same for one row [1, vocab], by sorting it: weights [1, vocab]."""
    if limited:
        mass = torch.softmax(mass.masked_fill(mass < _descending(mass).gather(1, top_k - 1), -math.inf), dim=1)
    if bool((top_p < 1.0).all()):
        mass = mass.masked_fill(mass < _least_likely(_descending(mass), top_p), 0.0)
    return mass


def _least_likely(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest weight in the smallest set of mass `top_p` [rows, 1]; `weights` descend from a total of 1."""
    if bool((top_p >= 1.0).all()):
        return torch.zeros_like(weights[:, :1])
    before = weights.cumsum(dim=1, dtype=torch.float64) - weights  # mass of the more likely tokens
    count = ((before < top_p) | (top_p >= 1.0)).sum(dim=1, keepdim=True)
    return weights.gather(1, count.clamp_(min=1) - 1)


def _descending(values: torch.Tensor) -> torch.Tensor:
    """[rows, vocab] sorted row by row, without indices."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1)).flip(
            1
        )  # vectorised; torch's sort takes 30 times as long
    return values.sort(dim=1, descending=True).values


def _by_token_id(rows: list[int], token_ids: torch.Tensor, weights: torch.Tensor) -> Candidates:
    """Drop the columns excluded in every row, and order the rest of each row by token id."""
    count = max(1, int((weights > 0).sum(dim=1).max()))
    token_ids, order = token_ids[:, :count].sort(dim=1)
    return Candidates(rows, token_ids, weights[:, :count].gather(1, order))


def largest(values: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.topk` of each row: values in descending order, and their columns.

    For a small width, first the blocks with the largest maxima are found, then the best of their members: the
    `width` largest values of a row lie in the `width` blocks with the largest maxima.
    """
    vocab = values.shape[1]
    if width * _TOP_BLOCK * 4 > vocab:
        top = values.topk(width, dim=1)
        return top.values, top.indices
    blocks = _blocks(values, _TOP_BLOCK, -math.inf)  # [rows, blocks, block]
    best = blocks.amax(dim=2).topk(width, dim=1, sorted=False).indices  # [rows, width]
    members = blocks.gather(1, best[:, :, None].expand(-1, -1, _TOP_BLOCK)).flatten(1)
    largest, index = members.topk(width, dim=1)
    columns = best.gather(1, index // _TOP_BLOCK) * _TOP_BLOCK + index % _TOP_BLOCK
    return largest, columns.clamp_(max=vocab - 1)


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse CDF per row: index, whether the weights were usable, and the number's remainder, again in [0, 1)."""
    cdf = weights.cumsum(dim=1, dtype=torch.float64)
    total = cdf[:, -1:]
    target = uniforms[:, None] * total
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=weights.shape[1] - 1)
    end = cdf.gather(1, index)
    start = torch.where(index > 0, cdf.gather(1, (index - 1).clamp_(min=0)), 0.0)
    rest = ((target - start) / (end - start)).clamp_(max=1.0 - 2.0**-53)
    return index.squeeze(1), (total.isfinite() & (total > 0)).squeeze(1), rest.squeeze(1)


def _blocks(values: torch.Tensor, size: int, fill: float) -> torch.Tensor:
    """[rows, columns] as [rows, blocks, size], filled up at the end where the columns do not divide."""
    lacking = -values.shape[1] % size
    if lacking:
        values = torch.nn.functional.pad(values, (0, lacking), value=fill)
    return values.reshape(values.shape[0], -1, size)


def _width_for(top_k: int) -> int:
    return next((width for width in _TOP_K_WIDTHS if width > top_k), _MAX_WIDTH + 1)


def _column(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
