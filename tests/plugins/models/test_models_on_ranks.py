"""Every architecture and every form of weights on several ranks: greedy tokens and logits are those of one rank.

The ranks are threads of one process. Where they gather, all bits are those of one rank. Where they sum, values are
rounded in another order, so a difference is admitted only where one rank's two best logits lie within `TIE`."""

from __future__ import annotations

import json
import random

import pytest
import torch

from interlace.config import load_settings
from interlace.errors import ConfigError
from interlace.interfaces.kernels import Kernels
from interlace.interfaces.weights import BlockWeight
from interlace.model_config import ModelConfig
from interlace.plugin_manager import PluginManager
from interlace.plugins.attention.native import NativeAttention
from interlace.plugins.checkpoints.gguf_blocks import FORMATS, decode
from interlace.plugins.kernels.native import NativeKernels
from interlace.plugins.models.llama import LlamaForCausalLM
from interlace.resolve import resolve
from interlace.testing.executor_driver import Driver, WorkerExecutor
from interlace.testing.model_harness import ModelHarness
from interlace.testing.parity import Agreement, Reference, agreement
from interlace.testing.ranks import ThreadedParallel, ThreadedRanks

COMMON = {
    "vocab_size": 301,  # a prime: no number of ranks divides it
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
MODELS = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama, tied, biases": {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral, window": {"architectures": ["MistralForCausalLM"], "sliding_window": 10},
    "qwen2, one KV head": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1},
    "qwen2, windows, tied": {"architectures": ["Qwen2ForCausalLM"], **WINDOWS, "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "gemma3, windows": {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 8, "num_hidden_layers": 7},
}
LAYOUTS = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]
FAST = {"llama": (2, 1), "qwen2, one KV head": (3, 1), "gemma3, windows": (2, 2), "qwen2, windows, tied": (1, 3)}


class Recorder(Driver):
    """Keeps the gap between the two best tokens, too."""

    def __init__(self, executor, spec):
        self.gaps = {}
        super().__init__(executor, spec, timeout_s=60)

    def _absorb(self, output):
        super()._absorb(output)
        for name, entries in output.logprobs.items():
            # Entry 0 is the chosen token, which is the best one; then come the best two.
            self.gaps.setdefault(name, []).extend(entry.logprobs[1] - entry.logprobs[2] for entry in entries)


def make_spec(folder, config, **settings):
    (folder / "config.json").write_text(json.dumps({**COMMON, **config}))
    given = {
        "model": str(folder),
        "checkpoint.use": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "max_model_len": 96,
        "cache.block_size": 8,
        "cache.memory": "64MiB",
        "scheduler.max_num_batched_tokens": 24,
    }
    loaded = load_settings(given | settings, env={})
    return resolve(loaded, PluginManager(loaded.settings))


def generate(executor, spec, seed=0):
    """Greedy output of four requests that share steps, in chunks: per request (prompt, tokens, gaps)."""
    source = random.Random(seed)
    prompts = [[source.randrange(300) for _ in range(length)] for length in (1, 7, 20, 50)]
    try:
        driver = Recorder(executor, spec)
        names = [driver.add(prompt, temperature=0.0, max_tokens=16, logprobs=2, ignore_eos=True) for prompt in prompts]
        driver.run()
        assert not any(driver.errors.values()), driver.errors
        return [
            Reference(prompt, driver.tokens[name], driver.gaps[name])
            for prompt, name in zip(prompts, names, strict=True)
        ]
    finally:
        executor.shutdown()


def ranks(tensor_parallel, pipeline_parallel):
    options = ThreadedRanks.Options(tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    return ThreadedRanks(options)


def check_alike(alone, together):
    results = [agreement(one, other.token_ids) for one, other in zip(alone, together, strict=True)]
    assert all(result is not Agreement.DIFFERENT for result, _ in results), results
    assert [result for result, _ in results].count(Agreement.EQUAL) >= len(results) - 1, results


CASES = [
    pytest.param(name, layout, id=f"{name}-{layout}", marks=() if FAST.get(name) == layout else pytest.mark.slow)
    for name in MODELS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_greedy_tokens(name, layout, tmp_path):
    spec = make_spec(tmp_path, MODELS[name], **{"kernels.use": "torch", "attention.use": "torch"})
    check_alike(generate(WorkerExecutor(), spec), generate(ranks(*layout), spec))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", ["float32", "bf16"])
def test_greedy_tokens_with_native_kernels(weights, layout, tmp_path):
    spec = make_spec(tmp_path, MODELS["qwen3"], weights=weights)
    assert spec.kernels[0].name == "native"
    check_alike(generate(WorkerExecutor(), spec), generate(ranks(*layout), spec))


EXACT = [
    {"weights": "int8", "dtype": "float32"},
    {"weights": "int8", "dtype": "bfloat16"},
    {"weights": "bf16", "dtype": "float32"},
    {"weights": "bf16", "dtype": "bfloat16", "deterministic": True},
    {"dtype": "float32", "deterministic": True},
]
EXACT_CASES = [
    pytest.param(name, layout, EXACT[(i + j) % 5], id=f"{name}-{layout}-{(i + j) % 5}", marks=CASES[6 * i + j].marks)
    for i, name in enumerate(MODELS)
    for j, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("name", "layout", "settings"), EXACT_CASES)
def test_tokens_and_their_gaps_have_the_bits_of_one_rank(name, layout, settings, tmp_path):
    """Where products round their inputs, and wherever `deterministic` is true."""
    native = {"kernels.use": "native", "attention.use": "native", "cache.block_size": 16}
    spec = make_spec(tmp_path, MODELS[name], **native, **settings)
    assert generate(ranks(*layout), spec) == generate(WorkerExecutor(), spec)


# ── Forms of weights, by their logits ───────────────────────────────────────────────────────────────────────────────

BLOCKED = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 67,
        "hidden_size": 256,
        "intermediate_size": 768,  # three blocks of 256: two ranks hold two and one
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,  # two query heads are a block; three ranks hold one, one and two of them
        "max_position_embeddings": 64,
    },
    "the test",
)
SHAPES = {
    "self_attn.q_proj": (512, 256),
    "self_attn.k_proj": (256, 256),
    "self_attn.v_proj": (256, 256),
    "self_attn.o_proj": (256, 512),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
SCALES = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
"""Where a block has float16 scales; elsewhere at its beginning."""


def block_weight(form, rows, size, generator):
    """Random blocks whose values are about as large as those of a real weight."""
    values, nbytes, _ = FORMATS[form]
    data = torch.randint(0, 256, (rows, size // values, nbytes), dtype=torch.uint8, generator=generator)
    for place in SCALES.get(form, [0]):
        scale = torch.randn(rows, size // values, generator=generator) * 1e-4 + 1e-3
        data[:, :, place : place + 2] = scale.half().unsqueeze(-1).view(torch.uint8)
    data = data.flatten(1)
    weight = BlockWeight(form, (rows, size), data, lambda rows: decode(form, rows), values)
    factor = size**-0.5 / weight.dequantize().std().item()
    for place in SCALES.get(form, [0]):
        halves = data.view(rows, -1, nbytes)[:, :, place : place + 2]
        halves.copy_((halves.contiguous().view(torch.float16).float() * factor).half().view(torch.uint8))
    return weight


def blocked_weights(form):
    generator = torch.Generator().manual_seed(0)
    yield "model.embed_tokens.weight", block_weight(form, 67, 256, generator)
    for layer in range(2):
        for name, (rows, size) in SHAPES.items():
            yield f"model.layers.{layer}.{name}.weight", block_weight(form, rows, size, generator)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(256)
    yield "model.norm.weight", torch.ones(256)
    yield "lm_head.weight", block_weight(form, 67, 256, generator)


class Counts(Kernels):
    """Kernels that know how their weights are kept."""

    made: dict[str, int]

    def make_block_linear(self, parts, bias=None):
        self.count("blocks")
        return super().make_block_linear(parts, bias)

    def make_linear(self, weight, bias=None):
        self.count("values")
        return super().make_linear(weight, bias)

    def count(self, what):
        made = self.__dict__.setdefault("made", {})
        made[what] = made.get(what, 0) + 1


class RoundingKernels(Counts, NativeKernels):
    """Multiply blocks with activations in 8 bits: ranks gather."""


class ExactBlocks(Kernels):
    def make_block_linear(self, parts, bias=None):
        return Kernels(self.options, self.spec).make_block_linear(parts, bias)


class ExactKernels(Counts, ExactBlocks):
    """Take activations as they are: ranks sum, and cut matrices between blocks."""


TOKENS = [3, 66, 0, 12, 12, 5, 40, 1, 2, 9, 33]


def run_blocked(form, kept, size=1, num_stages=1, *, gather, dtype="float32"):
    """(logits of a sequence, how the linears of each rank are kept)."""

    def work(rank):
        harness = ModelHarness(
            LlamaForCausalLM,
            BLOCKED,
            blocked_weights(form),
            attention=NativeAttention,
            kernels=RoundingKernels if gather else ExactKernels,
            dtype=dtype,
            kept_weights=kept,
            parallel=rank,
            grain=1 if gather else FORMATS[form][0],
            gather=gather,
            block_size=16,
        )
        layers = harness.model._layers
        return harness.run(TOKENS, chunk=4), layers[0]._mlp._gate_up._build.kernels.made

    results = ThreadedParallel.run(size, work, num_stages)
    return results[-1][0], [made for _, made in results]


def error(logits, exact):
    return ((logits - exact).abs().amax() / exact.abs().amax()).item()


FORMS = [pytest.param(form, marks=() if form in ("Q4_1", "Q6_K") else pytest.mark.slow) for form in FORMATS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_on_ranks_that_gather_give_the_bits_of_one_rank(form, dtype):
    """No matrix is cut within its rows, so all stay in blocks, however many ranks there are."""
    alone, made = run_blocked(form, "as-shipped", gather=True, dtype=dtype)
    assert made == [{"blocks": 8}], "query-key-value, output, gate-up and down of two layers"
    for layout in ((2, 1), (3, 1), (2, 2)):
        logits, made = run_blocked(form, "as-shipped", *layout, gather=True, dtype=dtype)
        assert all("values" not in kept for kept in made), made
        assert torch.equal(logits, alone), layout


@pytest.mark.parametrize("kept", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoded_forms_on_ranks_that_gather_give_the_bits_of_one_rank(kept, dtype):
    alone, _ = run_blocked("Q8_0", kept, gather=True, dtype=dtype)
    for layout in ((3, 1), (2, 2)):
        logits, _ = run_blocked("Q8_0", kept, *layout, gather=True, dtype=dtype)
        assert torch.equal(logits, alone), layout


@pytest.mark.parametrize("form", FORMS)
def test_blocks_stay_blocks_where_ranks_that_sum_cut_between_them(form):
    alone, made = run_blocked(form, "as-shipped", gather=False)
    assert made == [{"blocks": 9}], "query-key-value, output, gate-up and down of two layers, and the head"
    for layout in ((2, 1), (1, 2), (2, 2)):
        logits, made = run_blocked(form, "as-shipped", *layout, gather=False)
        assert all("values" not in kept for kept in made), made
        assert error(logits, alone) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_blocks_that_must_be_cut_are_decoded_and_nothing_is_lost(form):
    """Three ranks that sum cut the output projection within blocks of 256."""
    alone, _ = run_blocked(form, "as-shipped", gather=False)
    logits, made = run_blocked(form, "as-shipped", 3, gather=False)
    whole = FORMATS[form][0] < 256
    assert [kept.get("values", 0) for kept in made] == ([0, 0, 0] if whole else [2, 2, 0]), made
    assert error(logits, alone) < 1e-5


# ── What cannot be ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((7, 1), r"executor option tensor_parallel = 7 is more than the model's 6 attention heads; use 6 at most"),
        ((1, 5), r"executor option pipeline_parallel = 5, but the model has 4 layers .* set it to 4 at most"),
    ],
)
def test_layouts_that_do_not_fit_are_named(layout, message, tmp_path):
    executor = ranks(*layout)
    try:
        with pytest.raises(ConfigError, match=message):
            executor.start(make_spec(tmp_path, MODELS["llama"]), lambda event: None)
    finally:
        executor.shutdown()
