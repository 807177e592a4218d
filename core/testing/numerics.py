"""What each way of keeping weights costs in exactness: `python -m interlace.testing.numerics [--model M] [--json]`.

Every way runs the same real texts (ShareGPT exchanges) token by token, teacher-forced, and its logits are compared
with those of float32 compute over float32 weights, position by position:

    KL              Kullback-Leibler divergence from float32's distribution, in nats: mean, 99th percentile, largest
    agreement       share of positions where both hold the same token for the most likely one (greedy agreement)
    perplexity      of the texts themselves, under either

The reference attention serves all of them, so that only the kernels and the weights differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from interlace.bench.sharegpt import conversations
from interlace.config import load_settings
from interlace.plugin_manager import PluginManager
from interlace.resolve import open_tokenizer, resolve
from interlace.spec import ResolvedSpec
from interlace.testing.model_harness import ModelHarness
from interlace.worker.sizing import plan_kernels

WAYS = {
    "bf16": ("bfloat16", "bf16"),
    "int8": ("bfloat16", "int8"),
    "as-shipped": ("bfloat16", "as-shipped"),
    "float32 compute, as-shipped": ("float32", "as-shipped"),
    "float32 compute, bf16": ("float32", "bf16"),
}
"""Name → (dtype, weights) of the ways that are compared with float32 where kernels serve them."""

_BLOCK_SIZE = 32


class Closeness(msgspec.Struct, frozen=True, kw_only=True):
    """How near one way comes to float32."""

    way: str
    kernels: str
    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    agreement: float
    perplexity: float
    reference_perplexity: float


def compare(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per position, for logits [tokens, vocab] and the next tokens [tokens]: (KL, agreement, loss, reference's loss) as
    [4, tokens]. Computed in float64: the divergences are as small as float32's own rounding."""
    expected, found = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    same = (reference.argmax(-1) == logits.argmax(-1)).double()
    rows = torch.arange(len(targets))
    return torch.stack((divergence, same, -found[rows, targets], -expected[rows, targets]))


def measure(model: str, texts: Sequence[str], max_tokens: int, ways: Sequence[str] = tuple(WAYS)) -> list[Closeness]:
    """Each of `ways` over the texts, each cut to `max_tokens` tokens. Ways that no installed kernels serve raise
    `PluginError`; so does a checkpoint that cannot be read `CheckpointError`."""
    reference = _harness(_resolve(model, "float32", "float32"), max_tokens)[1]
    compared = {way: _harness(_resolve(model, *WAYS[way]), max_tokens) for way in ways}
    found: dict[str, list[torch.Tensor]] = {way: [] for way in ways}
    loaded = load_settings(constructor={"model": model})
    tokenizer = open_tokenizer(loaded, resolve(loaded, PluginManager(loaded.settings)))
    for text in texts:
        token_ids = tokenizer.encode(text)[:max_tokens]
        if len(token_ids) < 2:
            continue
        expected = reference.run(token_ids)[:-1]
        for way, (_, harness) in compared.items():
            found[way].append(compare(expected, harness.run(token_ids)[:-1], torch.tensor(token_ids[1:])))
    return [_summary(way, compared[way][0], torch.cat(parts, dim=1)) for way, parts in found.items()]


def _summary(way: str, kernels: str, parts: torch.Tensor) -> Closeness:
    divergence, same, loss, expected_loss = parts
    return Closeness(
        way=way,
        kernels=kernels,
        positions=len(same),
        kl_mean=float(divergence.mean()),
        kl_p99=float(divergence.quantile(0.99)),
        kl_max=float(divergence.max()),
        agreement=float(same.mean()),
        perplexity=float(loss.mean().exp()),
        reference_perplexity=float(expected_loss.mean().exp()),
    )


def _resolve(model: str, dtype: str, weights: str) -> ResolvedSpec:
    loaded = load_settings(constructor={"model": model, "dtype": dtype, "weights": weights})
    return resolve(loaded, PluginManager(loaded.settings))


def _harness(spec: ResolvedSpec, max_tokens: int) -> tuple[str, ModelHarness]:
    """(which kernels linears run on, the loaded model)."""
    kernels, selections = plan_kernels(spec)
    linears = [made.name for made in selections if made.kind == "kernels" and "make_linear" in made.reason]

    class Chosen:
        """Stands for a kernels class: makes what the engine would use."""

        Options = type(kernels).Options

        def __new__(cls, *_: Any) -> Any:
            return kernels

    harness = ModelHarness(
        spec.architecture.load(),
        spec.model_config,
        spec.open_checkpoint().weights(),
        kernels=Chosen,  # type: ignore[arg-type]
        dtype=spec.dtype,
        kept_weights=spec.weights,
        block_size=_BLOCK_SIZE,
        num_blocks=2 + max_tokens // _BLOCK_SIZE,
        max_model_len=max_tokens,
    )
    return ", ".join(linears), harness


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m interlace.testing.numerics", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=16, metavar="N", help="exchanges of ShareGPT (16)")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens of each, at most (512)")
    parser.add_argument("--way", action="append", choices=WAYS, help="compare this way only; may be repeated")
    parser.add_argument("--dataset-path", type=Path, metavar="FILE", help="another ShareGPT file")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    pool = conversations(args.dataset_path)
    texts = [f"{pair.prompt}\n{pair.reply}" for pair, _ in zip(pool, range(args.texts), strict=False)]
    results = measure(args.model, texts, args.tokens, args.way or tuple(WAYS))
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(results), indent=2).decode() + "\n")
        return 0
    print(
        "| dtype, weights | KL mean | KL p99 | KL max | agreement | perplexity (float32) |\n|---|---|---|---|---|---|"
    )
    for result in results:
        print(
            f"| {result.way} ({result.kernels}) | {result.kl_mean:.2e} | {result.kl_p99:.2e} | {result.kl_max:.2e} "
            f"| {result.agreement:.2%} | {result.perplexity:.3f} ({result.reference_perplexity:.3f}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
