"""Every attention kernel compiles for a Hopper GPU that is not there, within its shared memory."""

from __future__ import annotations

import re

import pytest

from interlace.plugins.triton import attention, kv_cache
from interlace.plugins.triton.attention_config import LayerShape, default_decode, default_prefill

PACKAGE = "interlace.plugins.triton"
NUMBERS = {
    **dict.fromkeys(("query_stride", "query_head_stride", "out_stride", "block_stride"), "i32!"),
    **dict.fromkeys(("table_stride", "slots"), "i32"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}
INDICES = dict.fromkeys(("tables", "table_rows", "starts", "counts", "seq_lens"), "*i32")
PARTS = dict.fromkeys(("part_acc", "part_peak", "part_total"), "*fp32")

LITTLE = 64
"""Bytes of a thread that may lie in memory instead of registers: numbers that are rarely looked at."""

SHAPES = [  # KV heads, group, head size, block size, fp8, window, soft cap
    ((8, 4, 128, 64), (False, 0, False)),
    ((8, 4, 64, 16), (False, 0, False)),
    ((3, 3, 64, 32), (True, 0, False)),
    ((1, 2, 256, 32), (False, 512, True)),
    ((2, 7, 80, 16), (False, 0, False)),
    ((8, 8, 128, 128), (True, 4096, False)),
]
"""Llama 3 8B and 1B, SmolLM2, Gemma 3, and odd ones."""


def case(name, kernel, shape, dtype, constants, types):
    """A case of `compile_kernels`, with the types of all arguments that the kernel might have cut to those it has."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    if not shape.is_fp8 and "scales" in kernel.arg_names:
        constants["scales"] = None
    types = {
        **types,
        **dict.fromkeys(("query", "out", "key", "value"), f"*{dtype}"),
        "data": "*fp8e4nv" if shape.is_fp8 else f"*{dtype}",
        "scales": "*fp32",
    }
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constants}
    return {
        "kernel": name,
        "types": types,
        "constants": constants,
        "options": options,
        "asm": ["ptx"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_attention_compiles(sizes, compile_kernels):
    from interlace.plugins.triton.attention_decode import decode_kernel, merge_kernel
    from interlace.plugins.triton.attention_prefill import prefill_kernel

    (kv_heads, group, head_size, block_size), (is_fp8, window, softcap) = sizes
    shape = LayerShape(kv_heads, group, head_size, block_size, 2, is_fp8, window, softcap)
    types = INDICES | PARTS | NUMBERS
    cases = []
    for dtype in ("fp16", "bf16"):
        for count in (1, shape.max_verify):
            constants = attention.decode_constants(shape, default_decode(shape), count)
            cases.append(
                case(f"{PACKAGE}.attention_decode:decode_kernel", decode_kernel, shape, dtype, constants, types)
            )
        constants = attention.prefill_constants(shape, default_prefill(shape))
        cases.append(
            case(f"{PACKAGE}.attention_prefill:prefill_kernel", prefill_kernel, shape, dtype, constants, types)
        )
        constants = attention.merge_constants(shape, 1)
        cases.append(case(f"{PACKAGE}.attention_decode:merge_kernel", merge_kernel, shape, dtype, constants, types))
        constants = kv_cache.write_constants(kv_heads, block_size, head_size)
        strides = dict.fromkeys(("key_stride", "key_head_stride", "value_stride", "value_head_stride"), "i32!")
        types_of_write = NUMBERS | strides | {"slots": "*i64", "num_tokens": "i32"}
        name = f"{PACKAGE}.kv_cache:write_kv_kernel"
        cases.append(case(name, kv_cache.write_kv_kernel, shape, dtype, constants, types_of_write))
    results = compile_kernels(cases)
    for compiled, made in zip(cases, results, strict=True):
        assert made["stack"] <= LITTLE, f"{compiled['kernel']} keeps {made['stack']} bytes of a thread in memory"
        if compiled["kernel"].endswith("prefill_kernel"):
            assert "wgmma.mma_async" in made["asm"]["ptx"], "prefill does not use the matrix units of a Hopper GPU"
        if compiled["kernel"].endswith("decode_kernel"):
            ptx = made["asm"]["ptx"]
            assert ptx.count("cp.async.wait_group") >= 1, "loads do not run ahead"
            assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx), "loads are of less than 16 bytes"


@pytest.mark.slow
def test_loads_run_ahead_of_the_products(compile_kernels):
    """Stages are what makes decoding fast, and easily lost: a table of blocks read in the loop halves them."""
    shape = LayerShape(8, 4, 128, 64, 2, False, 0, False)
    from interlace.plugins.triton.attention_decode import decode_kernel

    cases = []
    for stages in (2, 4):
        constants = attention.decode_constants(shape, default_decode(shape)._replace(stages=stages), 1)
        name = f"{PACKAGE}.attention_decode:decode_kernel"
        cases.append(case(name, decode_kernel, shape, "bf16", constants, INDICES | PARTS | NUMBERS))
    two, four = (result["shared"] for result in compile_kernels(cases))
    tile = 2 * 64 * 128 * 2  # bytes of keys and values
    assert four - two >= 2 * tile


@pytest.mark.slow
def test_float32_compiles(compile_kernels):
    from interlace.plugins.triton.attention_decode import decode_kernel

    shape = LayerShape(3, 3, 64, 32, 4, False, 0, False)
    constants = attention.decode_constants(shape, default_decode(shape), 1)
    types = INDICES | PARTS | NUMBERS
    compile_kernels([case(f"{PACKAGE}.attention_decode:decode_kernel", decode_kernel, shape, "fp32", constants, types)])


def test_a_case_that_does_not_compile_fails(compile_kernels):
    with pytest.raises(AssertionError, match="has no arguments"):
        compile_kernels(
            [{"kernel": f"{PACKAGE}.attention_decode:merge_kernel", "types": {"x": "i32"}, "constants": {}}]
        )
