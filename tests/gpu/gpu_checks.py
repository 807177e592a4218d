"""Correctness of the Triton kernels and of the attention backends for GPUs: the project's conformance suites on the
device, shapes of real models over poisoned caches, and whole models kernel by kernel."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_jobs import Outcome
from gpu_shapes import ATTENTION_SHAPES, open_dummy, small_config

from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.kernels import KernelSpec
from interlace.sampling.device import SamplingMode
from interlace.sampling.distribution import Shape, final_probabilities
from interlace.sampling.random import uniform
from interlace.testing import sampling_cases
from interlace.testing.attention_suite import AttentionConformance, PagedAttention
from interlace.testing.conformance import Conformance, failures, find_provider
from interlace.testing.kernels_suite import KernelsConformance
from interlace.testing.model_harness import ModelHarness

_ROUNDING = 2e-5
"""How far, in probability, rounding may move the border between two of many tokens."""


def _run_suite(base: type[Conformance], settings: dict[str, Any], tests: Sequence[str]) -> Outcome:
    """`tests`: the only ones to run; empty: all."""
    names = [name for name in dir(base) if name.startswith("test_")]
    assert set(tests) <= set(names), f"{base.__name__} has no {set(tests) - set(names)}"
    left_out = [name for name in names if tests and name not in tests]
    suite = type(f"Gpu{base.__name__}", (base,), {**settings, **dict.fromkeys(left_out)})
    return Outcome(num_checks=len(names) - len(left_out), failures=failures(suite))


def attention_suite(
    backend: str, device: str, seeds: list[int], quick: bool = False, tests: Sequence[str] = ()
) -> Outcome:
    """The conformance suite of attention backends; against dense attention in float64."""
    on_gpu = device != "cpu"
    settings: dict[str, Any] = {
        "attention": backend,
        "device": device,
        "seeds": tuple(seeds),
        "block_sizes": (16,) if quick else (16, 32, 64, 128),
        "head_sizes": (16,) if quick else (5, 16, 40, 64, 128, 256),
        "tolerances": {"float32": 5e-5, "float16": 1e-2} | ({"bfloat16": 6e-2} if on_gpu else {}),
    }
    return _run_suite(AttentionConformance, settings, tests)


def kernels_suite(device: str, seeds: list[int], tests: Sequence[str] = ()) -> Outcome:
    """The conformance suite of kernels for `triton`; against the definitions in float64."""
    # The interpreter rounds bfloat16 towards zero.
    tolerances = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2 if device != "cpu" else 3e-2}
    settings = {"kernels": "triton", "device": device, "seeds": tuple(seeds), "tolerances": tolerances}
    return _run_suite(KernelsConformance, settings, tests)


def attention_shapes(backend: str, device: str) -> Outcome:
    """Layers of real models: prompts, chunks, decoding and mixtures of them, kernel by kernel and as a graph; the
    caches hold NaN where nobody wrote. Also with an 8-bit cache, where the backend has one."""
    outcome = Outcome()
    provider = find_provider("attention", backend)
    kinds: list[tuple[str, dict[str, Any], float]] = [("bfloat16", {}, 6e-2), ("float16", {}, 1e-2)]
    if "kv_dtype" in provider.Options.model_fields:
        kinds.append(("bfloat16", {"kv_dtype": "fp8"}, 0.5))
    for name, spec in ATTENTION_SHAPES.items():
        for dtype, options, tolerance in kinds:
            what = f"{name}, {dtype}{', fp8 cache' if options else ''}"
            if (reason := provider.supports(spec, 64, dtype, device)) is not None:
                outcome.check(what, None if spec.softcap or spec.window else f"refused: {reason}")
                continue
            try:
                error = _traffic(provider, provider.Options(**options), spec, dtype, device)
            except Exception as problem:
                outcome.check(what, f"{type(problem).__name__}: {problem}")
                continue
            outcome.check(what, None if error <= tolerance else f"error {error:.3g}, allowed {tolerance}")
    return outcome


def _traffic(provider: Any, options: Any, spec: AttentionSpec, dtype: str, device: str) -> float:
    """The largest error."""
    paged = PagedAttention(provider, spec, 64, dtype, device, max_len=3072, options=options, num_sequences=12)
    steps: list[dict[str, int]] = [
        {"a": 2000, "b": 1, "c": 700},
        {"a": 1, "b": 1, "c": 1, "d": 5},
        {"d": 3, "a": 500, "e": 129, "b": 1},
        {"a": 1, "b": 2, "c": 8, "d": 9, "e": 1},
    ]
    errors = [paged.step(step) for step in steps]
    if paged.backend.graph_refusal() is None:
        paged.capture(8)
        errors += [paged.step(dict.fromkeys(names, 1)) for names in ("abcde", "a", "fgabc", "gfedcba")]
    return max(errors)


def sampling(device: str, seeds: list[int], vocab_sizes: list[int]) -> Outcome:
    """`Kernels.sample` and `Kernels.logprobs` against the distribution in float64: random cases, and vocabularies as
    models have them."""
    outcome = Outcome()
    provider = find_provider("kernels", "triton")
    kernels = provider(provider.Options(), KernelSpec("float32", device))
    for seed in seeds:
        outcome.check(f"samples, seed {seed}", _error_of(sampling_cases.check_sample, kernels.sample, device, seed))
        reported = _error_of(sampling_cases.check_logprobs, kernels.logprobs, device, seed)
        outcome.check(f"log probabilities, seed {seed}", reported)
    for vocab in vocab_sizes:
        for spread in (0.1, 3.0):
            outcome.check(f"{vocab} tokens, spread {spread}", _wide_sample(kernels.sample, device, vocab, spread))
        reported = _error_of(sampling_cases.check_logprobs, kernels.logprobs, device, vocab, [vocab])
        outcome.check(f"log probabilities of {vocab} tokens", reported)
    return outcome


def _error_of(check: Callable[..., None], *given: Any) -> str | None:
    try:
        check(*given)
    except AssertionError as found:
        return str(found)
    return None


def _wide_sample(sample: sampling_cases.Sample, device: str, vocab: int, spread: float) -> str | None:
    """None, or what is wrong with the tokens of rows with so many logits."""
    shapes = [Shape(0.0), Shape(1.0), Shape(0.7, 50), Shape(1.0, 0, 0.9), Shape(1.3, 5000, 0.95, 0.01), Shape(1.0, 700)]
    rows = len(shapes)
    seeds, indices, positions = [1 << 40 | row for row in range(rows)], [0] * rows, list(range(rows))
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    columns = sampling_cases.columns_of(shapes, seeds, indices, positions, device)
    tokens = sample(logits.to(device), columns, SamplingMode.TRUNCATED).tolist()
    chances, numbers = final_probabilities(logits, shapes), uniform(seeds, indices, positions)
    for row, token in enumerate(tokens):
        if not 0 <= token < vocab:
            return f"{shapes[row]}: token {token}"
        if row == 0:
            if token != int(logits[row].argmax()):
                return f"greedy: token {token}, the largest logit is that of {int(logits[row].argmax())}"
            continue
        end = float(chances[row][: token + 1].double().sum())
        start = end - float(chances[row][token])
        if not start - _ROUNDING <= numbers[row] <= end + _ROUNDING or not chances[row][token] > 0:
            return f"{shapes[row]}: token {token} holds {start:.6f} to {end:.6f}, the number is {numbers[row]:.6f}"
    return None


def models(device: str, dtypes: list[str]) -> Outcome:
    """Whole models over `triton` kernels and attention, where norms, rotary embedding and cache writes are one launch:
    logits of ragged batches against attention in float64 and torch's kernels in float32."""
    from interlace.plugins.models import gemma3, llama, qwen

    outcome = Outcome()
    attention, kernels = find_provider("attention", "triton"), find_provider("kernels", "triton")
    classes: dict[str, Any] = {
        "LlamaForCausalLM": llama.LlamaForCausalLM,
        "Qwen3ForCausalLM": qwen.Qwen3ForCausalLM,
        "Gemma3ForCausalLM": gemma3.Gemma3ForCausalLM,
    }
    steps: list[dict[str, int]] = [{"a": 21, "b": 3}, {"a": 1, "b": 9, "c": 1}, {"a": 1, "b": 1, "c": 1}]
    for name, model in classes.items():
        checkpoint = open_dummy(small_config(name, tiny=device == "cpu"))
        config, weights = checkpoint.config(), dict(checkpoint.weights())
        plain = ModelHarness(model, config, weights.items(), block_size=16)
        wanted = _logits(plain, steps, config.vocab_size)
        for dtype in dtypes:
            harness = ModelHarness(
                model, config, weights.items(), attention=attention, kernels=kernels, dtype=dtype, device=device,
                block_size=16, num_blocks=128,
            )  # fmt: skip
            error = float((_logits(harness, steps, config.vocab_size) - wanted).abs().max() / wanted.std())
            allowed = {"float32": 1e-3, "float16": 5e-2}.get(dtype, 0.25)
            good = error <= allowed  # not so if it is NaN
            outcome.check(f"{name}, {dtype}", None if good else f"logits differ by {error:.3g} of their spread")
    return outcome


def _logits(harness: ModelHarness, steps: Sequence[dict[str, int]], vocab: int) -> torch.Tensor:
    source = random.Random(0)
    parts = []
    for lengths in steps:
        given = harness.step({name: [source.randrange(vocab) for _ in range(size)] for name, size in lengths.items()})
        parts += [part.float().cpu() for part in given.values()]
    return torch.cat(parts)
