"""The kernels of `kernels.use = "triton"` compile for a Hopper GPU, in every type, without one."""

from __future__ import annotations

import re

import pytest

from interlace.plugins.triton import logprobs
from interlace.plugins.triton.norms import norm_constants
from interlace.plugins.triton.rope import rope_constants
from interlace.plugins.triton.sampling import PART, list_sizes, peaks_constants, plan_constants

_TYPES = ("bf16", "fp16", "fp32")


def _case(kernel, types, constants):
    values = dict(constants)
    options = {"num_warps": values.pop("num_warps", 4)}
    return {
        "kernel": f"interlace.plugins.triton.{kernel}",
        "types": types,
        "constants": values,
        "options": options,
        "asm": ["ptx"],
    }


def _numbers(names, kind="i32"):
    return dict.fromkeys(names.split(), kind)


def _pointers(names, kind):
    return dict.fromkeys(names.split(), f"*{kind}")


def _norms(kind, size, offset):
    constants = norm_constants(size, offset)
    plain = _pointers("x_ptr weight_ptr out_ptr", kind) | {"size": "i32!", "num_rows": "i32", "eps": "fp32"}
    strides = _numbers("token_stride head_stride", "i32!") | {"heads": "i32"}
    yield _case("norms:rms_norm_kernel", plain | strides, constants)
    added = plain | _pointers("residual_ptr", kind) | _numbers("x_stride residual_stride", "i32!")
    yield _case("norms:add_rms_norm_kernel", added, constants)


def _elementwise(kind):
    for gelu in (False, True):
        types = _pointers("gate_up_ptr out_ptr", kind) | _numbers("size row_stride", "i32!")
        yield _case("elementwise:gate_mul_kernel", types, {"GELU": gelu, "BLOCK": 1024})
    types = _pointers("x_ptr out_ptr", kind) | _numbers("size row_stride", "i32!") | {"factor": "fp32"}
    yield _case("elementwise:scale_kernel", types, {"BLOCK": 1024})
    types = _pointers("weight_ptr out_ptr", kind) | {"ids_ptr": "*i64"} | _numbers("size row_stride", "i32!")
    types |= _numbers("vocab id_stride")
    yield _case("elementwise:embedding_kernel", types, {"BLOCK": 1024})


def _ropes(kind, shape, rotary):
    strides = "query_stride query_head_stride key_stride key_head_stride value_stride value_head_stride table_stride"
    common = (
        _pointers("query key value out out_key", kind)
        | {"positions": "*i64", "table": "*fp32", "eps": "fp32"}
        | _numbers("num_positions position_stride")
        | _numbers(f"{strides} block_stride", "i32!")
    )
    weights = _pointers("query_weight key_weight", kind)
    no_weights, no_cache = dict.fromkeys(weights), {"data": None, "scales": None, "slots": None}
    yield _case("rope:rope_kernel", common, rope_constants(shape, rotary) | no_weights | no_cache)
    for offset in (False, True):
        constants = rope_constants(shape, rotary, norm=True, unit_offset=offset)
        yield _case("rope:rope_kernel", common | weights, constants | no_cache)
    cache = {"data": f"*{kind}", "slots": "*i64"}
    constants = rope_constants(shape, rotary, norm=True, block_size=64)
    yield _case("rope:rope_kernel", common | weights | cache, constants | {"scales": None})
    cache |= {"data": "*fp8e4nv", "scales": "*fp32"}
    yield _case("rope:rope_kernel", common | cache, rope_constants(shape, rotary, block_size=64) | no_weights)


def _sampling(vocab):
    sizes = list_sizes(vocab)
    row = _pointers("logits_ptr temperature_ptr", "fp32") | _numbers("vocab row_stride", "i32!")
    best, lists = {"best_ptr": "*i64"}, {"counts_ptr": "*i32", "lists_ptr": "*fp32", "masses_ptr": "*i64"}
    state = {"state_ptr": "*fp32"}
    columns = _pointers("temperature_ptr top_p_ptr min_p_ptr", "fp32") | {"top_k_ptr": "*i32"}
    own = _pointers("seed_ptr sample_index_ptr position_ptr tokens_ptr", "i64") | {"uniforms_ptr": "*fp64"}
    for runs in (0, vocab // 64):
        types = row | best | {"run_peaks_ptr": "*fp32"}
        yield _case("sampling:find_peaks", types, peaks_constants(runs))
    types = best | {"tokens_ptr": "*i64", "peaks_ptr": "*fp32", "parts": "i32"}
    yield _case("sampling:pick_best", types, {"PARTS": sizes["PARTS"], "ONLY_FINITE": True, "num_warps": 1})
    for truncated in (False, True):
        types = best | columns | own | state | {"run_peaks_ptr": "*fp32"} | _numbers("vocab parts runs")
        yield _case("sampling:plan_rows", types, plan_constants(vocab, truncated, seeded=True))
        constants = {"TRUNCATED": truncated, "PART": PART, **sizes}
        yield _case("sampling:weigh_parts", row | state | lists, constants | {"num_warps": 8})
        types = row | state | lists | {"top_k_ptr": "*i32", "top_p_ptr": "*fp32", "uniforms_ptr": "*fp64"}
        types |= {"tokens_ptr": "*i64", "parts": "i32"}
        yield _case("drawing:draw_rows", types, constants | {"num_warps": 16})


def _logprobs(vocab, kind):
    given = {"logits_ptr": f"*{kind}", "token_ids_ptr": "*i64", "counts_ptr": "*i32", "row_stride": "i32!"}
    own = _pointers("peaks_ptr sums_ptr", "fp32") | {"above_ptr": "*i32", "best_ptr": "*i64"}
    yield _case("logprobs:read_parts", given | own | {"vocab": "i32!"}, logprobs.parts_constants(20))
    found = {"ids_ptr": "*i64", "values_ptr": "*fp32", "ranks_ptr": "*i64", "parts": "i32"}
    yield _case("logprobs:report_rows", given | own | found, logprobs.rows_constants(vocab, 20))


@pytest.mark.slow
@pytest.mark.parametrize("kind", _TYPES)
def test_layers_compile(compile_kernels, kind):
    cases = [case for size in (64, 576, 4096, 16384) for case in _norms(kind, size, size == 576)]
    cases += [*_elementwise(kind), *_ropes(kind, (32, 8, 128), 128), *_ropes(kind, (9, 3, 80), 32)]
    _check_code(cases, compile_kernels(cases))


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [49152, 128256, 262144])
def test_sampling_compiles(compile_kernels, vocab):
    cases = [*_sampling(vocab), *(case for kind in _TYPES for case in _logprobs(vocab, kind))]
    _check_code(cases, compile_kernels(cases))


def _check_code(cases, results):
    """All is kept in registers, and what reads or writes whole rows does so by 16 bytes at a time."""
    for case, made in zip(cases, results, strict=True):
        kernel = case["kernel"].rpartition(":")[2]
        assert made["stack"] == 0, f"{kernel} keeps {made['stack']} bytes of a thread in memory"
        if kernel not in ("pick_best", "plan_rows", "report_rows"):
            assert re.search(r"ld\.global[^;]*\.v4", made["asm"]["ptx"]), f"{kernel}: no loads of 16 bytes, {case}"


def test_a_few_compile(compile_kernels):
    """What a change breaks first: the newest features of the language are in these."""
    assert len(compile_kernels([*_norms("bf16", 576, False), next(_ropes("bf16", (9, 3, 64), 64))])) == 3
