"""Weight tables and linear layers: what is loaded where, and that raw weights are let go."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from interlace.errors import CheckpointError, ConfigError
from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.interfaces.model import BuildContext, Parallel
from interlace.interfaces.weights import BlockWeight
from interlace.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from interlace.layers.linear import ColumnParallelLinear, QKVLinear, RowParallelLinear
from interlace.layers.mlp import GatedMLP
from interlace.layers.parallel import HeadShare, share, share_heads
from interlace.layers.weights import WeightTable
from interlace.testing.ranks import ThreadedParallel


class FakeRank(Parallel):
    """A rank whose collectives return its own part, for tests that combine the ranks themselves."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def build(rank: int = 0, size: int = 1, kernels: Any = None) -> BuildContext:
    kernels = kernels or Kernels(Kernels.Options(), KernelSpec("float32", "cpu"))
    return BuildContext(kernels, FakeRank(rank, size), torch.float32, torch.device("cpu"), 64)


def per_rank(size: int, weights: dict[str, torch.Tensor], make: Any) -> list[Any]:
    """The layer that `make(build, table)` builds, on each of `size` ranks, loaded."""
    layers = []
    for rank in range(size):
        table = WeightTable()
        layers.append(make(build(rank, size), table))
        table.load(weights.items())
    return layers


# ── Tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_problem_is_named_at_once():
    table = WeightTable()
    for layer in (0, 1, 2, 5):
        table.at("layers").at(str(layer)).expect("weight", (2,), lambda tensor: None)
    table.expect("norm", (3,), lambda tensor: None)
    table.ignore("inv_freq")
    two = torch.zeros(2)
    given = [("layers.5.weight", two), ("layers.5.weight", two), ("norm", two), ("extra", two), ("a.inv_freq", two)]
    with pytest.raises(CheckpointError) as caught:
        table.load(given)
    message = str(caught.value)
    assert "missing: layers.{0-2}.weight" in message
    assert "given twice: layers.5.weight" in message
    assert "unexpected: extra" in message
    assert "norm is [2] instead of [3]" in message
    assert "inv_freq" not in message


def test_complete_checkpoint_loads_and_two_owners_are_refused():
    table = WeightTable()
    got = []
    table.at("a").expect("weight", (2,), got.append)
    table.load([("a.weight", torch.ones(2))])
    assert torch.equal(got[0], torch.ones(2))
    with pytest.raises(ValueError, match=r"two layers expect the checkpoint tensor 'a\.weight'"):
        table.at("a").expect("weight", (2,), got.append)


# ── Shards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_heads_are_dealt_out_and_kv_heads_shared():
    assert [share_heads(8, 4, rank, 2) for rank in range(2)] == [HeadShare(4, 0, 2, 0), HeadShare(4, 4, 2, 2)]
    assert [share_heads(8, 2, rank, 4).first_kv for rank in range(4)] == [0, 0, 1, 1]
    # SmolLM2: KV heads go with their three query heads.
    assert [share_heads(9, 3, rank, 2) for rank in range(2)] == [HeadShare(6, 0, 2, 0), HeadShare(3, 6, 1, 2)]
    four = [HeadShare(2, 0, 1, 0), HeadShare(1, 2, 1, 0), HeadShare(3, 3, 1, 1), HeadShare(3, 6, 1, 2)]
    assert [share_heads(9, 3, rank, 4) for rank in range(4)] == four
    with pytest.raises(
        ConfigError, match=r"executor option tensor_parallel = 10 is more than .* 9 attention heads; use 9"
    ):
        share_heads(9, 3, 0, 10)
    with pytest.raises(ConfigError, match="9 attention heads do not divide into 4 KV heads"):
        share_heads(9, 4, 0, 2)


@pytest.mark.parametrize("kv_heads", range(1, 9))
@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_every_head_has_one_place_beside_its_kv_head(kv_heads, group):
    for size in range(1, kv_heads * group + 1):
        shares = [share_heads(kv_heads * group, kv_heads, rank, size) for rank in range(size)]
        queries = [head for held in shares for head in range(held.first_query, held.first_query + held.query)]
        assert queries == list(range(kv_heads * group))
        for held in shares:
            assert held.query == held.kv * group if size <= kv_heads else held.kv == 1 and held.query >= 1
            first, last = held.first_query // group, (held.first_query + held.query - 1) // group
            assert (first, last) == (held.first_kv, held.first_kv + held.kv - 1)
        assert max(held.kv for held in shares) - min(held.kv for held in shares) <= 1


def test_rows_and_columns_are_cut_between_blocks():
    assert share(12, 2, 3, "x") == slice(8, 12)
    assert [share(1536, rank, 4, "x", 32) for rank in (0, 3)] == [slice(0, 384), slice(1152, 1536)]
    parts = [share(1536, rank, 4, "x", 256) for rank in range(4)]
    assert parts == [slice(0, 512), slice(512, 1024), slice(1024, 1280), slice(1280, 1536)]
    assert [share(100, rank, 3, "x") for rank in range(3)] == [slice(0, 36), slice(36, 68), slice(68, 100)]
    assert [share(512, rank, 4, "x", 256).stop for rank in range(4)] == [128, 256, 384, 512], "fewer blocks than ranks"
    assert [share(3, rank, 3, "x", 256) for rank in range(3)] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    with pytest.raises(
        ConfigError, match=r"executor option tensor_parallel = 4 is more than the outputs of up = 3; use 3"
    ):
        share(3, 0, 4, "the outputs of up")


@pytest.mark.parametrize("bias", [False, True])
def test_column_then_row_summed_over_ranks_is_the_whole(bias):
    weights = {
        "up.weight": torch.randn(12, 5),
        "gate.weight": torch.randn(12, 5),
        "down.weight": torch.randn(5, 12),
    }
    if bias:
        weights |= {"up.bias": torch.randn(12), "gate.bias": torch.randn(12), "down.bias": torch.randn(5)}

    def make(build: BuildContext, table: WeightTable) -> Any:
        column = ColumnParallelLinear(build, table, {"gate": 12, "up": 12}, 5, bias)
        return column, RowParallelLinear(build, table, "down", 12, 5, bias)

    x = torch.randn(3, 5)
    total = torch.zeros(3, 5)
    for column, row in per_rank(2, weights, make):
        gate, up = column(x).chunk(2, dim=-1)
        assert gate.shape == (3, 6)
        total += row(gate * up)
    linear = torch.nn.functional.linear
    gate = linear(x, weights["gate.weight"], weights.get("gate.bias"))
    up = linear(x, weights["up.weight"], weights.get("up.bias"))
    assert torch.allclose(total, linear(gate * up, weights["down.weight"], weights.get("down.bias")), atol=1e-4)


def test_gathering_linears_compute_each_output_whole():
    """Inputs of uneven parts, a bias, outputs that no number of ranks divides; weights in blocks stay so."""
    cuts = {1: [0, 12], 2: [0, 8, 12], 3: [0, 6, 10, 12]}
    weights = {"out.weight": bytes_weight(65, 12), "out.bias": torch.randn(65)}
    x = torch.randn(3, 12)

    def work(parallel: Parallel) -> tuple[torch.Tensor, list[list[tuple[int, int]]]]:
        kernels = BlockKernels(BlockKernels.Options(), KernelSpec("float64", "cpu", "as-shipped"))
        context = BuildContext(kernels, parallel, torch.float64, torch.device("cpu"), 64, gather=True)
        ends = cuts[parallel.size]
        columns = [slice(first, last) for first, last in pairwise(ends)]
        table = WeightTable()
        layer = RowParallelLinear(context, table, "out", 12, 65, True, columns)
        table.load(weights.items())
        assert table.num_parameters == kernels.in_blocks[0][0][0] * 13
        return layer(x.double()[:, columns[parallel.rank]]), kernels.in_blocks

    expected = torch.nn.functional.linear(x.double(), weights["out.weight"].dequantize().double()) + weights["out.bias"]
    for size, outputs in ((1, [65]), (2, [33, 32]), (3, [22, 22, 21])):
        results = ThreadedParallel.run(size, work)
        assert [kept for _, kept in results] == [[[(rows, 12)]] for rows in outputs]
        for result, _ in results:
            assert torch.equal(result, results[0][0]) and torch.allclose(result, expected, atol=1e-12)


def test_qkv_ranks_hold_their_heads():
    size, hidden = 4, 6
    weights = {
        "q_proj.weight": torch.randn(8 * size, hidden),
        "k_proj.weight": torch.randn(2 * size, hidden),
        "v_proj.weight": torch.randn(2 * size, hidden),
    }
    x = torch.randn(3, hidden)
    query, key, value = (x @ weights[f"{name}_proj.weight"].T for name in "qkv")

    def make(build: BuildContext, table: WeightTable) -> Any:
        heads = share_heads(8, 2, build.parallel.rank, build.parallel.size)
        return QKVLinear(build, table, hidden, 8, 2, size, heads)

    for rank, layer in enumerate(per_rank(4, weights, make)):
        got = layer(x).split([2 * size, size, size], dim=-1)
        kv = slice(rank // 2 * size, (rank // 2 + 1) * size)
        assert torch.allclose(got[0], query[:, rank * 2 * size : (rank + 1) * 2 * size], atol=1e-5)
        assert torch.allclose(got[1], key[:, kv], atol=1e-5)
        assert torch.allclose(got[2], value[:, kv], atol=1e-5)


def test_vocabulary_split_over_ranks():
    weight = torch.randn(7, 4)  # 7 rows over 3 ranks: 3 + 3 + 1 and padding
    token_ids = torch.tensor([0, 6, 3, 2, 5])
    embeddings = per_rank(3, {"weight": weight}, lambda b, t: VocabParallelEmbedding(b, t, 7, 4))
    assert torch.equal(sum(layer(token_ids) for layer in embeddings), weight[token_ids])
    heads = per_rank(3, {"weight": weight}, lambda b, t: VocabParallelHead(b, t, 7, 4))
    hidden = torch.randn(2, 4)
    logits = torch.cat([head(hidden) for head in heads], dim=-1)
    assert torch.allclose(logits[:, :7], hidden @ weight.T, atol=1e-5)
    assert logits.dtype == torch.float32 and torch.equal(logits[:, 7:], torch.zeros(2, 2))


# ── Loading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_raw_weights_are_let_go_as_soon_as_a_layer_is_complete():
    seen: list[torch.Tensor] = []

    class Counting(Kernels):
        def make_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
            seen.append(weight.clone())
            return lambda x: x

    table = WeightTable()
    kernels = Counting(Counting.Options(), KernelSpec("float32", "cpu"))
    GatedMLP(build(kernels=kernels), table, 4, 6, "silu")
    references: list[weakref.ref[Any]] = []

    def weights() -> Any:
        for name, shape in (("up_proj", (6, 4)), ("gate_proj", (6, 4)), ("down_proj", (4, 6))):
            array = np.full(shape, len(references) + 1, dtype=np.float32)
            references.append(weakref.ref(array))  # lives as long as any tensor over its memory
            yield f"{name}.weight", torch.from_numpy(array)
            del array
        # down_proj, given last, is still a variable of `load`; up_proj and gate_proj are joined and must be gone.
        assert [reference() is None for reference in references[:2]] == [True, True]

    table.load(weights())
    assert len(seen) == 2
    assert torch.equal(seen[0], torch.cat((torch.full((6, 4), 2.0), torch.full((6, 4), 1.0)))), "gate first, then up"


def test_layers_without_weights_say_so():
    table = WeightTable()
    layer = RowParallelLinear(build(), table, "down", 4, 4)
    head = VocabParallelHead(build(), table.at("lm_head"), 4, 4)
    for unloaded in (layer, head):
        with pytest.raises(RuntimeError, match="call the model's load_weights first"):
            unloaded(torch.zeros(1, 4))


def test_tied_head_uses_the_embedding_and_passes_over_its_copy():
    table = WeightTable()
    embedding = VocabParallelEmbedding(build(), table.at("embed"), 5, 4)
    head = VocabParallelHead(build(), table.at("lm_head"), 5, 4, tied=embedding)
    weight = torch.randn(5, 4)
    table.load([("embed.weight", weight), ("lm_head.weight", weight)])
    head.finish()
    hidden = torch.randn(2, 4)
    assert torch.allclose(head(hidden), hidden @ weight.T, atol=1e-6)


# ── Blocks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode_bytes(data: torch.Tensor) -> torch.Tensor:
    return data.float() - 100.0


def bytes_weight(rows: int, columns: int) -> BlockWeight:
    """A made-up format: every value a byte."""
    data = torch.randint(90, 110, (rows, columns), dtype=torch.uint8)
    return BlockWeight("BYTES", (rows, columns), data, decode_bytes)


class BlockKernels(Kernels):
    """Notes what comes in blocks."""

    in_blocks: list[list[tuple[int, int]]]

    def make_block_linear(self, parts: Any, bias: torch.Tensor | None = None) -> Any:
        self.__dict__.setdefault("in_blocks", []).append([part.shape for part in parts])
        return super().make_block_linear(parts, bias)


def layers_over(build: BuildContext, table: WeightTable) -> Any:
    embedding = VocabParallelEmbedding(build, table.at("embed"), 7, 4)
    head = VocabParallelHead(build, table.at("lm_head"), 7, 4, tied=embedding)
    gate_up = ColumnParallelLinear(build, table, {"gate": 6, "up": 6}, 4)
    down = RowParallelLinear(build, table, "down", 6, 4)
    return embedding, gate_up, down, head


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", ["auto", "as-shipped", "bf16", "float32", "mixed"])
def test_blocks_are_kept_or_decoded_and_mean_the_same(way, size):
    blocks = {"gate": bytes_weight(6, 4), "up": bytes_weight(6, 4), "down": bytes_weight(4, 6)}
    blocks |= {"embed": bytes_weight(7, 4)}
    values = {name: weight.dequantize() for name, weight in blocks.items()}  # small whole numbers: exact in bfloat16
    given: dict[str, Any] = {f"{name}.weight": weight for name, weight in blocks.items()}
    if way == "mixed":
        given["up.weight"] = values["up"]
    weights = "as-shipped" if way == "mixed" else way
    token_ids, logits, total = torch.tensor([6, 0, 3]), [], torch.zeros(3, 4)
    for rank in range(size):
        kernels = BlockKernels(BlockKernels.Options(), KernelSpec("float32", "cpu", weights))
        context, table = build(rank, size, kernels), WeightTable()
        embedding, gate_up, down, head = layers_over(context, table)
        table.load(given.items())
        head.finish()
        gate_up_shapes = [] if way == "mixed" else [[(6 // size, 4)] * 2]
        down_shapes = [[(4, 6)]] if size == 1 else []  # blocks cannot be cut by columns
        assert kernels.in_blocks == [*gate_up_shapes, *down_shapes, [(-(-7 // size), 4)]]
        total += embedding(token_ids)
        x = torch.ones(3, 4)
        gate, up = gate_up(x).chunk(2, dim=-1)
        part = slice(rank * (6 // size), (rank + 1) * (6 // size))
        assert torch.equal(gate, x @ values["gate"][part].T) and torch.equal(up, x @ values["up"][part].T)
        assert torch.equal(down(x[:, :1].expand(3, 6 // size)), values["down"][:, part].sum(1).expand(3, 4))
        logits.append(head(x))
    assert torch.equal(total, values["embed"][token_ids])
    assert torch.equal(torch.cat(logits, dim=-1)[:, :7], x @ values["embed"].T)


def test_only_layers_that_ask_for_blocks_get_them():
    table, got = WeightTable(), []
    table.expect("plain", (2, 4), got.append)
    table.expect("blocks", (2, 4), got.append, blocks=True)
    weight = bytes_weight(2, 4)
    table.load([("plain", weight), ("blocks", weight)])
    assert torch.equal(got[0], weight.dequantize()) and got[1] is weight
