"""The whole engine against transformers: the same greedy tokens for random-weight models, with device graphs and
without them, one step at a time and two in flight; with log probabilities and without."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
import transformers
from gpu_jobs import Outcome
from gpu_shapes import SMALL_MODELS, open_dummy, small_config

from interlace import LLM, SamplingParams
from interlace.testing.parity import Agreement, Reference, agreement, transformers_greedy
from interlace.worker.graphs import DecodeGraphs

_CONFIGS = {
    "LlamaForCausalLM": "LlamaConfig",
    "Qwen3ForCausalLM": "Qwen3Config",
    "Gemma3ForCausalLM": "Gemma3TextConfig",
}


def parity(device: str, architecture: str, lengths: list[int], max_tokens: int, backends: list[str]) -> Outcome:
    """Prompts of these lengths at once, in float32. A token may differ where the reference's two best logits tie."""
    outcome = Outcome()
    assert architecture in SMALL_MODELS
    checkpoint = open_dummy(small_config(architecture, tiny=device == "cpu"))
    source = random.Random(1)
    vocab = checkpoint.config().vocab_size
    prompts = [[source.randrange(3, vocab) for _ in range(length)] for length in lengths]
    references = _references(architecture, checkpoint, prompts, max_tokens)
    on_gpu = device != "cpu"
    ways = itertools.product((True, False), (1, 2)) if on_gpu else [(False, 1)]
    for graphs, steps in ways:
        for backend in backends if (graphs, steps) in ((True, 2), (False, 1)) else backends[:1]:
            what = f"{architecture}, {backend}, graphs {'on' if graphs else 'off'}, {steps} in flight"
            settings = _settings(device, backend, graphs, steps)
            try:
                error = _run(str(checkpoint.path), settings, references, max_tokens, wants_graphs=graphs and on_gpu)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
            outcome.check(what, error)
    return outcome


def _settings(device: str, backend: str, graphs: bool, steps: int) -> dict[str, Any]:
    return {
        "checkpoint.use": "dummy",
        "dtype": "float32",
        "device": device,
        "attention.use": backend,
        "kernels.use": "triton",
        "engine.process": "inline",
        "cache.memory": "512MiB" if device != "cpu" else "16MiB",
        "gpu.graphs": graphs,
        "gpu.steps_in_flight": steps,
        "scheduler.max_num_seqs": 8,
        "scheduler.max_num_batched_tokens": 64,
    }


def _references(architecture: str, checkpoint: Any, prompts: list[list[int]], max_tokens: int) -> list[Reference]:
    """What transformers says, in float32 on the CPU."""
    raw = {name: value for name, value in checkpoint.raw_config().items() if name != "architectures"}
    config = getattr(transformers, _CONFIGS[architecture])(**raw)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager", dtype=torch.float32)
    found = model.load_state_dict(dict(checkpoint.weights()), strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    model.tie_weights()
    return [transformers_greedy(model.eval(), prompt, max_tokens) for prompt in prompts]


def _run(
    path: str, settings: dict[str, Any], references: list[Reference], max_tokens: int, *, wants_graphs: bool
) -> str | None:
    """None, or what differs."""
    made: list[DecodeGraphs] = []
    original = DecodeGraphs._capture

    def capture(graphs: DecodeGraphs, key: Any) -> None:
        original(graphs, key)
        made.append(graphs)

    DecodeGraphs._capture = capture  # type: ignore[method-assign]
    try:
        with LLM(path, **settings) as llm:
            common: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
            params = [SamplingParams(**common, logprobs=2 if index % 2 else None) for index in range(len(references))]
            prompts = [{"prompt_token_ids": reference.prompt_token_ids} for reference in references]
            answers = llm.generate(prompts, params, progress=False)
    finally:
        DecodeGraphs._capture = original  # type: ignore[method-assign]
    for index, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        if answer.outputs[0].finish_reason != "length":
            return f"prompt {index} ended with {answer.outputs[0].finish_reason}: {answer}"[:300]
        token_ids = list(answer.outputs[0].token_ids)
        how, position = agreement(reference, token_ids)
        if how is Agreement.DIFFERENT:
            return f"prompt {index} ({len(reference.prompt_token_ids)} tokens) differs from token {position} on"
        entries = answer.outputs[0].logprobs
        if (entries is not None) != bool(index % 2) or any(
            not (entry[token].logprob < 0 and entry[token].rank == 1 and 2 <= len(entry) <= 3)
            for token, entry in zip(token_ids, entries or (), strict=False)
        ):
            return f"prompt {index}: log probabilities {entries}"[:300]
    if wants_graphs and (not made or made[-1].refusal is not None):
        return f"no graph was captured: {made[-1].refusal if made else 'nobody asked for one'}"
    return None
