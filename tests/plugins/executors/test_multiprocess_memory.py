"""Shared memory between ranks: the ring that plans go through, and the board that tensors are exchanged on."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from interlace.plugins.executors.processes.ring import RingClosedError, RingReader, RingWriter
from interlace.plugins.executors.ranks import board as boards
from interlace.plugins.executors.ranks.board import Board
from interlace.plugins.executors.ranks.meeting import make_seats


@pytest.fixture
def ring():
    """`ring(readers, capacity)` → a writer; released afterwards."""
    made = []

    def make(readers, capacity):
        made.append(RingWriter(readers, capacity))
        return made[-1]

    yield make
    for writer in made:
        writer.release()


@pytest.mark.parametrize("num_readers", [1, 3])
def test_every_reader_gets_every_message_in_order(ring, num_readers):
    """Messages of all sizes, far longer ones than the ring and empty ones among them."""
    writer = ring(num_readers, 1000)
    source = random.Random(7)
    messages = [source.randbytes(source.choice((0, 1, 30, 491, 492, 493, 991, 992, 993, 5000))) for _ in range(300)]

    def read(seat):
        reader = RingReader(seat)
        return [bytes(reader.read()) for _ in messages]

    with ThreadPoolExecutor(num_readers) as pool:
        read_by = [pool.submit(read, seat) for seat in writer.seats]
        for message in messages:
            writer.write(message)
        assert all(future.result(30) == messages for future in read_by)


def test_a_reader_that_waits_uses_no_processor(ring):
    writer = ring(1, 64)
    reader, cpu = RingReader(writer.seats[0]), []

    def read():
        began = sum(os.times()[:2])
        reader.read()
        cpu.append(sum(os.times()[:2]) - began)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), "there was nothing to read"
    writer.write(b"at last")
    thread.join(10)
    assert cpu[0] < 0.25, f"waiting for half a second took {cpu[0]:.2f} s of processor time"


def test_a_writer_waits_for_the_slowest_reader(ring):
    writer = ring(2, 100)
    fast, slow = (RingReader(seat) for seat in writer.seats)
    writer.write(b"x" * 60)
    thread = threading.Thread(target=writer.write, args=(b"y" * 60,))
    thread.start()
    assert fast.read() == b"x" * 60
    thread.join(0.05)
    assert thread.is_alive(), "the slow reader's bytes were written over"
    assert slow.read() == b"x" * 60
    thread.join(10)
    assert fast.read() == slow.read() == b"y" * 60


def test_closing_lets_go_of_a_writer_that_waits(ring):
    writer, errors = ring(2, 100), []

    def write():
        try:
            writer.write(b"z" * 1000)
        except RingClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    writer.close()
    thread.join(10)
    assert len(errors) == 1
    with pytest.raises(RingClosedError):
        writer.write(b"")


def test_nothing_of_a_ring_has_a_name_and_nothing_stays_open():
    before = set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    writer = RingWriter(3, 4096)
    assert set(os.listdir("/dev/shm")) == before[1]
    writer.release()
    assert set(os.listdir("/proc/self/fd")) == before[0]


# ── the board ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def on_board():
    """`on_board(size, work)` → `work(board, rank)` of each rank, on threads."""
    opened = []

    def run(size, work):
        seats = make_seats(size)
        opened.extend(fd for seat in seats for fd in seat.descriptors)
        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(work, Board(seat), seat.rank) for seat in seats]
            return [future.result(60) for future in futures]

    yield run
    for descriptor in set(opened):
        os.close(descriptor)


def tensors(rank, dtype):
    """Of all sizes, also such as do not fit the board at once."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(1, 8), (3, 5), (1, 1), (7, 576), (600, 700), (0, 4), (2, 3, 4)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_right_and_the_same_bits_everywhere(on_board, size, dtype):
    def work(board, rank):
        return [board.all_reduce(x) for x in tensors(rank, dtype)]

    results = on_board(size, work)
    for place, alone in enumerate(zip(*(tensors(rank, dtype) for rank in range(size)), strict=True)):
        exact = torch.stack([x.double() for x in alone]).sum(0)
        for result in results:
            assert torch.equal(result[place], results[0][place])
        tolerance = 1e-5 if dtype is torch.float32 else 0.05
        assert torch.allclose(results[0][place].double(), exact, rtol=tolerance, atol=tolerance)


def test_a_sum_in_parts_is_the_sum_at_once(on_board, monkeypatch):
    """The order of ranks is kept whatever the size, so a row's sum does not depend on the rows beside it."""
    many = [torch.randn(64, 40, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    whole = on_board(3, lambda board, rank: board.all_reduce(many[rank].clone()))[0]
    rows = on_board(3, lambda board, rank: torch.cat([board.all_reduce(row.clone()) for row in many[rank].split(1)]))[0]
    assert torch.equal(whole, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(1.0, 1.0), (1.0, 0.4), (0.2, 1.0, 0.6)])
def test_gathering(on_board, cuts, dtype):
    """`cuts`: how much of the columns each rank has."""

    def parts(rank):
        return [x[..., : widths(x)[rank]].contiguous() for x in tensors(rank, dtype)]

    def widths(x):
        return [max(1, int(x.shape[-1] * cut)) for cut in cuts]

    def work(board, rank):
        return [board.all_gather(x, widths(whole)) for x, whole in zip(parts(rank), tensors(rank, dtype), strict=True)]

    results = on_board(len(cuts), work)
    for place, alone in enumerate(zip(*(parts(rank) for rank in range(len(cuts))), strict=True)):
        for result in results:
            assert torch.equal(result[place], torch.cat(alone, dim=-1))


def test_a_row_that_is_too_long_for_the_board_is_refused_by_all(on_board):
    longest = boards.PLACE_BYTES // 4 + 1

    def work(board, rank):
        return board.all_gather(torch.zeros(1, [longest, 3][rank]), [longest, 3])

    assert on_board(2, work) == [None, None]


def test_ranks_that_hurry_wait_for_ranks_that_do_not(on_board):
    """Whoever is ahead may be in the next round, but not in the one after that."""

    def work(board, rank):
        pause, source = threading.Event(), random.Random(rank)
        totals = []
        for number in range(200):
            if source.random() < 0.05:
                pause.wait(0.002)
            totals.append(board.all_reduce(torch.full((3,), float(number * (rank + 1))))[0].item())
        return totals

    assert on_board(3, work) == [[6.0 * number for number in range(200)]] * 3
