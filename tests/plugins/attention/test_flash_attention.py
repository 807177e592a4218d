"""Attention `flash`: which engine takes prompts and why, and what each engine is given. FlashAttention itself needs a
GPU: in its place stand fakes with its signature, which read what they are given by the dense definition."""

from __future__ import annotations

import logging

import pytest
import torch

from interlace.interfaces.attention import AttentionSpec
from interlace.plugins.attention import flash_engines
from interlace.plugins.attention.flash import FlashAttention
from interlace.testing.attention_suite import PagedAttention
from interlace.testing.reference import dense_attention

SPEC = AttentionSpec(4, 2, 16)
WINDOWED = AttentionSpec(4, 2, 16, kind="window", window=21)
CAPPED = AttentionSpec(4, 2, 16, softcap=2.0)
STEPS = ({"a": 30, "b": 2, "c": 12}, {"a": 12, "b": 1, "c": 1}, {"b": 40, "a": 9}, {"a": 1, "b": 1, "c": 10})


def dense(query, key, value, scale, window=-1, softcap=0.0):
    kind = {"kind": "window", "window": window + 1} if window >= 0 else {}
    spec = AttentionSpec(query.shape[1], key.shape[1], query.shape[2], scale=scale, softcap=softcap, **kind)
    return dense_attention(spec, query, key, value).to(query.dtype)


def between(starts):
    return [slice(a, b) for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)]


def read_pages(pages, table, length):
    return pages[table.long()].flatten(0, 1)[:length]


class FakeInterface:
    """flash_attn_interface (FlashAttention 3)."""

    @staticmethod
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale, causal,
        window_size, softcap, num_splits,
    ):  # fmt: skip
        rows = between(cu_seqlens_q)
        assert causal and window_size[1] == 0 and num_splits == 1
        assert max_seqlen_q == max(row.stop - row.start for row in rows)
        assert page_table.dtype == cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        parts = []
        for row, table, length in zip(rows, page_table, cache_seqlens.tolist(), strict=True):
            key, value = (read_pages(pages, table, length) for pages in (k_cache, v_cache))
            first = max(0, length - (row.stop - row.start) - window_size[0]) if window_size[0] >= 0 else 0
            parts.append(dense(q[row], key[first:], value[first:], softmax_scale, window_size[0], softcap))
        return torch.cat(parts)


class FakePackage:
    """flash_attn (FlashAttention 2)."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, block_table=None,
    ):  # fmt: skip
        queries, keys = between(cu_seqlens_q), between(cu_seqlens_k)
        assert causal and window_size[1] == 0 and dropout_p == 0.0
        assert max_seqlen_k == max(row.stop - row.start for row in keys)
        parts = []
        for place, (row, seen) in enumerate(zip(queries, keys, strict=True)):
            length = seen.stop - seen.start
            if block_table is None:
                key, value = k[seen], v[seen]
            else:
                assert k.shape[1] % 256 == 0, "pages are multiples of 256 tokens"
                key, value = (read_pages(pages, block_table[place], length) for pages in (k, v))
            parts.append(dense(q[row], key, value, softmax_scale, window_size[0], softcap))
        return torch.cat(parts)


def varlen_of_today(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert block_table is None and num_splits == 1
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return FakePackage.flash_attn_varlen_func(
        *(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k),
        softmax_scale=scale,
        causal=window_size[1] == 0,
        window_size=window_size,
    )


def varlen_of_yesterday(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, *, scale=None):
    assert query.shape[1] == key.shape[1], "groups are unknown"
    window = (-1, 0 if is_causal else -1)
    return varlen_of_today(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window, num_splits=1
    )


@pytest.fixture
def accept(monkeypatch):
    """Let an engine in that refuses the CPU."""
    return lambda engine: monkeypatch.setattr(engine, "refusal", classmethod(lambda cls, spec, dtype, device: None))


@pytest.fixture
def install_package(monkeypatch):
    def install(name, fake):
        real = flash_engines.importlib.import_module
        monkeypatch.setattr(
            flash_engines.importlib, "import_module", lambda wanted: fake if wanted == name else real(wanted)
        )

    return install


@pytest.fixture
def varlen(monkeypatch):
    def use(call):
        import inspect

        parameters = frozenset(inspect.signature(call).parameters)
        monkeypatch.setattr(flash_engines, "_varlen", lambda: (call, parameters))

    return use


def run(spec, prefill, block_size=16):
    cases = PagedAttention(
        *(FlashAttention, spec, block_size),
        max_len=96,
        num_sequences=4,
        options=FlashAttention.Options(prefill=prefill),
    )
    for lengths in STEPS:
        assert cases.step(lengths) < 1e-5, lengths
    return cases.backend.engine


@pytest.mark.parametrize("spec", [SPEC, WINDOWED, CAPPED], ids=["full", "window", "softcap"])
def test_flash_attention_3_reads_pages(spec, accept, install_package):
    accept(flash_engines.FlashAttention3)
    install_package("flash_attn_interface", FakeInterface)
    assert run(spec, "fa3").paged


@pytest.mark.parametrize(
    ("spec", "block_size"), [(SPEC, 16), (WINDOWED, 16), (CAPPED, 16), (SPEC, 256), (WINDOWED, 256)], ids=str
)
def test_flash_attention_2_reads_large_pages_only(spec, block_size, accept, install_package):
    accept(flash_engines.FlashAttention2)
    install_package("flash_attn", FakePackage)
    assert run(spec, "fa2", block_size).paged == (block_size == 256)


@pytest.mark.parametrize(
    ("spec", "call"), [(SPEC, varlen_of_today), (WINDOWED, varlen_of_today), (SPEC, varlen_of_yesterday)]
)
def test_varlen_is_called_as_the_installed_torch_wants(spec, call, accept, varlen):
    accept(flash_engines.TorchVarlen)
    varlen(call)
    assert not run(spec, "varlen").paged


@pytest.mark.parametrize("group", [1, 2])
def test_sdpa_takes_prompts_on_a_cpu(group, caplog):
    """Not a fake: this runs, with and without context, and is what `auto` takes here."""
    with caplog.at_level(logging.INFO):
        engine = run(AttentionSpec(2 * group, 2, 16), "auto")
    assert engine.name == "torch's scaled_dot_product_attention"
    (line,) = {record.message for record in caplog.records if record.name == "interlace.attention.flash"}
    assert "prompts by torch's scaled_dot_product_attention" in line
    assert "not flash-attn 3: the package flash_attn_interface is not installed" in line
    assert "decoding by the Triton kernel" in line


def test_installed_varlen_is_as_expected():
    """The one of this torch knows what `varlen_of_today` knows."""
    call, parameters = flash_engines._varlen()
    assert call is not None
    assert {"scale", "window_size", "enable_gqa", "num_splits"} <= parameters


@pytest.mark.parametrize(
    ("spec", "dtype", "reason"),
    [
        (CAPPED, "float32", "not torch's scaled_dot_product_attention: it knows no soft cap"),
        (WINDOWED, "float32", "not torch's scaled_dot_product_attention: it knows no window"),
        (AttentionSpec(4, 2, 300), "float32", "head sizes go up to 256, not 300"),
        (SPEC, "bfloat16", "its decode kernel: runs in float16, float32 on cpu, not in bfloat16"),
    ],
)
def test_refusals_on_a_cpu(spec, dtype, reason):
    assert reason in FlashAttention.supports(spec, 16, dtype, "cpu")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def installed(monkeypatch, *names):
    real = flash_engines.importlib.util.find_spec
    wheels = {"flash_attn_interface", "flash_attn"}
    monkeypatch.setattr(
        flash_engines.importlib.util,
        "find_spec",
        lambda name: (object() if name in names else None) if name in wheels else real(name),
    )


@pytest.mark.parametrize(
    ("wheels", "spec", "dtype", "engine"),
    [
        (["flash_attn_interface", "flash_attn"], SPEC, "bfloat16", "flash-attn 3"),
        (["flash_attn"], CAPPED, "bfloat16", "flash-attn 2"),
        ([], SPEC, "bfloat16", "torch.nn.attention.varlen"),
        ([], WINDOWED, "float16", "torch.nn.attention.varlen"),
        ([], SPEC, "float32", "torch's scaled_dot_product_attention"),
        ([], AttentionSpec(4, 2, 20), "bfloat16", "torch's scaled_dot_product_attention"),
        ([], CAPPED, "bfloat16", None),
        ([], WINDOWED, "float32", None),
    ],
)
def test_the_best_engine_that_can_is_taken_on_a_gpu(wheels, spec, dtype, engine, hopper):
    installed(hopper, *wheels)
    found, against = flash_engines.choose_engine(spec, dtype, "cuda:0")
    assert (found.name if found else None) == engine
    reason = FlashAttention.supports(spec, 16, dtype, "cuda:0")
    if engine is None:
        assert reason == "no FlashAttention for prompts: " + "; ".join(against)
    else:
        assert reason is None


def test_flash_attention_3_is_for_hopper_only(hopper):
    installed(hopper, "flash_attn_interface")
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = flash_engines.FlashAttention3.refusal(SPEC, "bfloat16", "cuda:0")
    assert reason == "it is made for GPUs of compute capability 9.x, cuda:0 has 8.x"


def test_an_engine_that_cannot_is_an_error_when_named():
    with pytest.raises(ValueError, match=r"prefill = 'fa3' is not possible: not flash-attn 3: the package"):
        FlashAttention(FlashAttention.Options(prefill="fa3"), SPEC, 16, "float32", "cpu")
