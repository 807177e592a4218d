"""Attention `triton` in Triton's interpreter: edges, splits, invariance of bits, the 8-bit cache, refusals."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from interlace.interfaces.attention import AttentionSpec
from interlace.plugins.attention.triton import InvariantTritonAttention, TritonAttention
from interlace.plugins.triton import attention_config, runtime
from interlace.plugins.triton.kv_cache import view_cache, write_kv
from interlace.testing.attention_suite import PagedAttention
from interlace.testing.reference import dense_attention

SPLITTING = 260
"""Tokens that take three splits of 128."""


def paged(spec, block_size=16, dtype="float32", *, backend=TritonAttention, max_len=64, options=None, **rest):
    return PagedAttention(
        backend,
        spec,
        block_size,
        dtype,
        max_len=max_len,
        num_sequences=4,
        options=backend.Options(**options or {}),
        **rest,
    )


@pytest.mark.parametrize(
    ("group", "window"),
    [(3, 17), *(pytest.param(g, w, marks=pytest.mark.slow) for g, w in ((1, 0), (1, 17), (3, 0), (4, 0), (8, 17)))],
)
def test_edge_lengths(group, window):
    """One token, and all sizes around a block, after every such context; alone and side by side."""
    spec = AttentionSpec(group * 2, 2, 16, kind="window" if window else "full", window=window)
    cases = paged(spec)
    edges = [1, 15, 16, 17]
    for step in range(3):
        lengths = {str(place): edges[(place + step) % 4] for place in range(4)}
        assert cases.step(lengths) < 1e-5, lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "block_size"),
    [
        (AttentionSpec(4, 2, 80, softcap=2.0), 16),
        (AttentionSpec(2, 1, 256, kind="window", window=100), 64),
        (AttentionSpec(16, 1, 24, kind="window", window=1), 32),
        (AttentionSpec(6, 2, 64, scale=0.3, kind="window", window=200, softcap=1.5), 128),
    ],
)
def test_splits_and_long_prompts(spec, block_size):
    cases = paged(spec, block_size, max_len=SPLITTING + 64)
    for lengths in ({"a": SPLITTING, "b": 20}, {"a": 1, "b": 1}, {"b": 3, "a": 8}, {"a": 5, "c": 1}):
        assert cases.step(lengths) < 1e-5, lengths


@pytest.mark.slow
def test_tokens_whose_windows_reach_into_one_split_more():
    """Eight tokens see 135 keys, from the last one of a split on: three splits, although a window fits into two."""
    cases = paged(AttentionSpec(2, 1, 16, kind="window", window=128), max_len=270)
    cases.step({"a": 254, "b": 254})
    assert cases.step({"b": 8, "a": 8}) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_figures_for_gpus_are_right_too(dtype):
    """The interpreter runs other tiles than a GPU; here it runs those."""
    cases = paged(AttentionSpec(4, 2, 64), 32, dtype, max_len=400)
    shape = cases.backend.shape
    decode, prefill = attention_config.default_decode(shape), attention_config.default_prefill(shape)
    cases.backend.layer = cases.backend.layer._replace(decode=decode, prefill=prefill)
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    for lengths in ({"a": 150, "b": 40}, {"a": 1, "b": 9}, {"a": 1, "b": 1}):
        assert cases.step(lengths) < tolerance, lengths


def run_alone_and_among_others(spec, dtype, lengths):
    """The outputs of sequence `a`, which takes steps of `lengths`, twice."""
    results = []
    for company in (False, True):
        rng = random.Random(1)
        cases = paged(spec, dtype=dtype, max_len=SPLITTING + 64)
        for length in lengths:
            others = {name: rng.choice([1, 2, 5, 30]) for name in rng.sample("bcd", 2)} if company else {}
            items = [*others.items(), ("a", length)] if rng.random() < 0.5 else [("a", length), *others.items()]
            cases.step(dict(items))
        results.append(torch.cat(cases.outputs["a"]))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_has_the_same_bits_among_others(dtype):
    for spec in (AttentionSpec(6, 2, 16), AttentionSpec(4, 2, 16, kind="window", window=150)):
        alone, among = run_alone_and_among_others(spec, dtype, [SPLITTING, 1, 1, 4, 8, 9, 1])
        assert torch.equal(alone, among), spec


@pytest.mark.slow
def test_who_runs_a_split_does_not_change_bits(monkeypatch):
    outputs = []
    for multiprocessors in (1, 200):
        monkeypatch.setattr(runtime, "multiprocessors", lambda device, found=multiprocessors: found)
        cases = paged(AttentionSpec(4, 2, 16), max_len=SPLITTING + 8)
        cases.step({"a": SPLITTING})
        cases.step({"a": 1})
        outputs.append(cases.outputs["a"][1])
        lanes = cases.backend._decode_launch(_pieces(1), 1, SPLITTING).lanes
        assert lanes == (2 if multiprocessors == 1 else 3)
    assert torch.equal(*outputs)


def _pieces(count):
    from interlace.plugins.triton.attention_decode import Pieces

    return Pieces(*torch.zeros(4, count, dtype=torch.int32).unbind(0))


@pytest.mark.slow
def test_invariant_bits_where_splits_change_their_size():
    """Splits of sequences beyond 1,024 tokens are larger: no piece of a prompt may have tokens of both kinds."""
    outputs = []
    spec = AttentionSpec(1, 1, 16)
    for cuts in ([15, 20], [20, 1, 1, 5, 8]):
        cases = paged(spec, max_len=1100)
        cases.step({"a": 1000})  # with the backend that is faster at it: only what it writes counts
        cases.backend = InvariantTritonAttention(InvariantTritonAttention.Options(), spec, 16, "float32", "cpu")
        for length in cuts:
            cases.step({"a": length})
        outputs.append(torch.cat(cases.outputs["a"])[1000:])
    assert torch.equal(*outputs)


def fp8(values):
    """What an 8-bit cache gives back of [tokens, heads, head_size], by torch's own rounding."""
    scale = values.float().abs().amax(-1, keepdim=True) / 448
    return (values.float() / scale).to(torch.float8_e4m3fn).double() * scale


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 30])
def test_fp8_cache_attends_to_rounded_keys_and_values(window):
    spec = AttentionSpec(6, 2, 40, kind="window" if window else "full", window=window)
    cases = paged(spec, dtype="float16", max_len=200, options={"kv_dtype": "fp8"})
    query, key, value = cases._stream("a", 0)
    for length in (140, 1, 6):
        cases.step({"a": length, "b": 2})
    got = torch.cat(cases.outputs["a"]).double()
    wanted = dense_attention(spec, query[:147], fp8(key[:147]), fp8(value[:147]))
    assert (got - wanted).abs().max() < 5e-3


def test_fp8_cache_holds_the_nearest_numbers():
    torch.manual_seed(0)
    key, value = torch.randn(2, 5, 3, 24).unbind(0)
    key[0, 0] = 0  # a scale of zero would make NaN
    cache = torch.full((4, 2 * 3 * 16 * (24 + 4)), -1, dtype=torch.int8)
    view = view_cache(cache, 3, 16, 24, True)
    write_kv(key, value, view, torch.tensor([16, 17, -1, 40, 63]), 16)
    stored = view.data.view(4, -1)[:, : 2 * 3 * 16 * 24].view(4, 2, 3, 16, 24)
    scales = cache.view(torch.float32)[:, 2 * 3 * 16 * 24 // 4 :].view(4, 2, 3, 16)
    for token, (block, offset) in {0: (1, 0), 1: (1, 1), 3: (2, 8), 4: (3, 15)}.items():
        for part, given in enumerate((key, value)):
            largest = given[token].abs().amax(-1)
            scale = torch.where(largest > 0, largest / 448, 1.0)
            assert torch.equal(scales[block, part, :, offset], scale)
            wanted = (given[token] / scale[:, None]).to(torch.float8_e4m3fn).float()
            # Below the normal numbers the interpreter truncates.
            assert (stored[block, part, :, offset].float() - wanted).abs().max() <= 2**-9
    written = [1, 2, 3]
    assert (cache[[0]] == -1).all() and all((cache[block] != -1).any() for block in written)


def test_negative_slots_are_not_written():
    cache = torch.full((2, 2, 1, 16, 8), torch.nan)
    write_kv(torch.ones(2, 1, 8), torch.ones(2, 1, 8), view_cache(cache, 1, 16, 8, False), torch.tensor([-1, 16]), 16)
    assert cache[0].isnan().all()
    assert (cache[1, :, 0, 0] == 1).all() and cache[1, :, 0, 1:].isnan().all()


@pytest.mark.parametrize(
    ("spec", "block_size", "dtype", "device", "reason"),
    [
        (AttentionSpec(4, 2, 64), 32, "float32", "cpu", None),
        (AttentionSpec(4, 2, 257), 32, "float32", "cpu", "head sizes go up to 256, not 257"),
        (AttentionSpec(4, 2, 64), 8, "float32", "cpu", "block sizes are powers of two from 16 on, not 8"),
        (AttentionSpec(4, 2, 64), 48, "float32", "cpu", "block sizes are powers of two from 16 on, not 48"),
        (AttentionSpec(129, 1, 64), 32, "float32", "cpu", "up to 128 query heads may share a KV head, not 129"),
        (AttentionSpec(4, 2, 64), 32, "bfloat16", "cpu", "runs in float16, float32 on cpu, not in bfloat16"),
        (AttentionSpec(4, 2, 64), 32, "bfloat16", "cuda", "torch sees no CUDA device here"),
        (AttentionSpec(4, 2, 64), 32, "bfloat16", "mps", "runs on CUDA devices, not on mps"),
    ],
)
def test_refusals(spec, block_size, dtype, device, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TritonAttention.supports(spec, block_size, dtype, device) == reason


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = TritonAttention.supports(AttentionSpec(4, 2, 64), 32, "float16", "cuda:0")
    assert reason == "needs a GPU of compute capability 8.0 or newer, cuda:0 has 7.5"


def test_an_8_bit_cache_is_refused_where_gpus_know_no_such_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    options = TritonAttention.Options(kv_dtype="fp8")
    with pytest.raises(ValueError, match=r"kv_dtype = 'fp8' is not possible: it needs .* 8.9 or newer, cuda has 8.6"):
        TritonAttention(options, AttentionSpec(4, 2, 64), 32, "float16", "cuda")


WITHOUT = """
import sys
{before}
from interlace.interfaces.attention import AttentionSpec
from interlace.plugins.attention.triton import TritonAttention
print(TritonAttention.supports(AttentionSpec(4, 2, 64), 32, "float32", {device!r}))
assert {loaded} == ("triton" in sys.modules)
"""
HIDDEN = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda name: None if name == 'triton' else f(name)"


@pytest.mark.parametrize(
    ("before", "device", "loaded", "reason"),
    [
        (HIDDEN, "cuda", False, "Triton is not installed (pip install 'interlace[gpu]')"),
        (HIDDEN, "cpu", False, "Triton is not installed (pip install 'interlace[gpu]')"),
        (
            "",
            "cpu",
            True,
            "Triton kernels run on GPUs; on the CPU only in Triton's interpreter (TRITON_INTERPRET=1), for tests",
        ),
    ],
    ids=["no-triton", "no-triton-cpu", "no-interpreter"],
)
def test_refusals_in_a_process_without(before, device, loaded, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    code = WITHOUT.format(before=before, device=device, loaded=loaded)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == (reason, 0), done.stderr
