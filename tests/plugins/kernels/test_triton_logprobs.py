"""Log probabilities in Triton kernels, interpreted. The conformance suite compares with float64; here is the rest."""

from __future__ import annotations

import pytest
import torch

from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.plugins.kernels.triton import TritonKernels
from interlace.sampling.device import LogprobColumns
from interlace.sampling.logprobs import report_logits

KERNELS = TritonKernels(Kernels.Options(), KernelSpec("float32", "cpu"))
VOCAB = 9001  # three parts, the last one not full


def report(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> LogprobColumns:
    return KERNELS.logprobs(logits, torch.tensor(tokens), torch.tensor(counts, dtype=torch.int32))


def test_the_reports_of_the_host():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    tokens = [4095, 4096, 9000]
    found, wanted = report(logits, tokens, [20] * 3), report_logits(logits, torch.tensor(tokens))
    assert torch.equal(found.token_ids, wanted.token_ids) and torch.equal(found.ranks, wanted.ranks)
    assert torch.allclose(found.values, wanted.values, atol=2e-6, rtol=0)


def test_of_equal_tokens_the_first_come_first():
    logits = torch.zeros(1, VOCAB)
    logits[0, [8000, 17]] = 1.0
    found = report(logits, [17], [20])
    assert found.token_ids[0].tolist() == [17, 17, 8000, *range(17), 18]
    assert found.ranks.tolist() == [1]


def test_a_row_alone_and_in_company():
    """The same bits, however many tokens the others or it itself asks for."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    tokens = [5, 4096, 700, 9000]
    together = report(logits, tokens, [20, 3, -1, 0])
    for row, count in enumerate([20, 3, -1, 0]):
        if count >= 0:
            alone = report(logits[row : row + 1], tokens[row : row + 1], [20])
            for one, all_rows in zip(alone[:2], together[:2], strict=True):
                assert torch.equal(one[0, : 1 + count], all_rows[row, : 1 + count])
            assert alone.ranks[0] == together.ranks[row]


def test_rows_that_do_not_ask_are_not_read(monkeypatch):
    """Nothing is written for them."""
    given = []
    empty = torch.empty

    def poisoned(*shape, **rest):
        given.append(empty(*shape, **rest).fill_(77))
        return given[-1]

    monkeypatch.setattr(torch, "empty", poisoned)
    found = report(torch.randn(2, 50), [1, 2], [-1, 1])
    assert (found.token_ids[0] == 77).all() and (found.values[0] == 77).all() and found.ranks[0] == 77
    assert (found.values[1, :2] < 0).all() and (found.values[1, 2:] == 77).all()
    assert sum(tensor.numel() for tensor in given) < 2 * 128, "no copy of the logits"


@pytest.mark.parametrize("shift", [-1e4, 0.0, 3e38])
def test_parts_without_a_chance_and_logits_of_any_size(shift):
    """A part of -inf adds nothing, and rows far from zero are as exact as any."""
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 4000:4004] = shift
    found = report(logits, [4002], [5])
    assert found.values[0, :5].tolist() == pytest.approx([-1.3862944] * 5, abs=1e-6)
    assert found.values[0, 5] == -torch.inf and found.token_ids[0, 1:6].tolist() == [4000, 4001, 4002, 4003, 0]


def test_logits_that_are_not_float32_and_rows_of_a_larger_tensor():
    wide = torch.randn(2, VOCAB + 7, generator=torch.Generator().manual_seed(2)).half()
    found = report(wide[:, :VOCAB], [3, 4], [20, 20])
    wanted = report_logits(wide[:, :VOCAB].float(), torch.tensor([3, 4]))
    assert torch.allclose(found.values, wanted.values, atol=2e-6, rtol=0)
    assert torch.equal(found.ranks, wanted.ranks)


def test_no_rows():
    assert [part.shape for part in report(torch.randn(0, 30), [], [])] == [(0, 21), (0, 21), (0,)]
