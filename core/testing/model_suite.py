"""Conformance suite for models. A third party subclasses it:

    class TestMine(ModelConformance):
        model = "MyForCausalLM"

        def transformers_config(self):
            return MyConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)

The model of that configuration gets random weights, and ours must compute what it computes, however a sequence is
cut and whatever shares its batch. For an architecture that transformers does not know, override `model_config`,
`weights` and `reference` instead.

Attention and kernels are the plain references unless `attention` and `kernels` name others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interlace.errors import CheckpointError
from interlace.interfaces.attention import AttentionBackend, AttentionSpec
from interlace.interfaces.kernels import Kernels, KernelSpec
from interlace.interfaces.model import BuildContext, ForwardContext, Model, Parallel
from interlace.model_config import ModelConfig
from interlace.testing.conformance import Conformance, find_offer, find_provider, shuffled, skip
from interlace.testing.model_harness import MakeContext, ModelHarness
from interlace.testing.ranks import ThreadedParallel
from interlace.testing.reference import ReferenceAttention

Weights = list[tuple[str, torch.Tensor]]


class ModelConformance(Conformance):
    """What every model must do."""

    kind = "models"
    selector = "model"
    model: ClassVar[str | type[Model]]
    attention: ClassVar[str | type[AttentionBackend]] = ReferenceAttention
    kernels: ClassVar[str | type[Kernels]] = Kernels
    tensor_parallel: ClassVar[Sequence[int]] = (2, 3, 4)
    """Numbers of tensor ranks the model of the configuration can be split over."""
    pipeline_parallel: ClassVar[Sequence[int]] = (2,)
    """Numbers of pipeline stages, at most one per layer; looked at if the model says `supports_pipeline`."""
    num_tokens: ClassVar[int] = 29
    """Length of the sequences; more than a sliding window, at most the model's positions."""
    tolerance: ClassVar[float] = 1e-5
    """Largest error of a logit in float32, relative to the largest logit."""
    bf16_tolerance: ClassVar[float] = 0.15
    """The same in bfloat16, which rounds in every layer."""
    seeds = range(4)
    reference_model: ClassVar[Any] = None
    read_config: ClassVar[Callable[[dict[str, Any], str], ModelConfig]]
    over: ClassVar[dict[str, Any]]

    @classmethod
    def setup_class(cls) -> None:
        super().setup_class()
        cls.reference_model = None
        cls.read_config = ModelConfig.from_hf
        if isinstance(cls.model, str):
            cls.read_config = find_offer("models", cls.model).model_config
        cls.over = {kind: find_provider(kind, getattr(cls, kind), kind) for kind in ("attention", "kernels")}

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[Any]]:
        lengths = {"chunk": (cls.num_tokens, 1, 7)}
        return {**super().parameters(), **lengths, "ranks": cls.tensor_parallel, "stages": cls.pipeline_parallel}

    # ── What to compare with ────────────────────────────────────────────────────────────────────────────────────

    def transformers_config(self) -> Any:
        """A configuration of transformers for a tiny model. Exercise what the architecture has: several layers, fewer
        KV heads than heads, windows shorter than `num_tokens`."""
        raise NotImplementedError(f"write transformers_config in {type(self).__name__}, or what it is used for")

    def model_config(self) -> ModelConfig:
        """The same configuration as a checkpoint of it gives."""
        name = self.model.rpartition(":")[2] if isinstance(self.model, str) else self.model.__name__
        raw = {**self.transformers_config().to_dict(), "architectures": [name]}
        return type(self).read_config(raw, f"{type(self).__name__}.transformers_config")

    def weights(self) -> Weights:
        """What a checkpoint of the model yields; each tensor once where weights are tied."""
        seen: set[tuple[int, torch.Size]] = set()
        found: Weights = []
        for name, tensor in self._transformers_model().state_dict().items():
            if (tensor.data_ptr(), tensor.shape) not in seen:
                seen.add((tensor.data_ptr(), tensor.shape))
                found.append((name, tensor))
        return found

    @torch.inference_mode()
    def reference(self, token_ids: list[int]) -> torch.Tensor:
        """Right logits [tokens, vocab] of one sequence with these weights."""
        logits: torch.Tensor = self._transformers_model()(torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits

    # ── Results ─────────────────────────────────────────────────────────────────────────────────────────────────

    def test_reference_is_worth_comparing(self) -> None:
        """Flat logits, or logits that ignore the tokens before, would match anything."""
        tokens = self._tokens(0)
        logits = self.reference(tokens)
        other = self.reference([(tokens[0] + 1) % self.model_config().vocab_size, *tokens[1:]])
        assert logits.std() > 0.01 * logits.abs().amax(), "the reference's logits are flat"
        assert not torch.allclose(logits[1], other[1], rtol=1e-3), "the reference ignores earlier tokens"

    def test_one_sequence(self, chunk: int) -> None:
        """Whole, token by token, and in chunks."""
        tokens = self._tokens(1)
        self._compare(self._harness().run(tokens, chunk=chunk), self.reference(tokens), f"chunks of {chunk}")

    def test_mixed_batches(self, seed: int) -> None:
        """Sequences prefill and decode side by side, and new ones take the blocks of those that ended."""
        rng = random.Random(seed)
        harness = self._harness()
        waiting = {f"sequence {number}": self._tokens(100 * seed + number) for number in range(6)}
        waiting = {name: tokens[: rng.randint(1, self.num_tokens)] for name, tokens in waiting.items()}
        done: dict[str, torch.Tensor] = {}
        while unfinished := [name for name in waiting if len(done.get(name, ())) < len(waiting[name])]:
            chosen = rng.sample(unfinished[:4], rng.randint(1, len(unfinished[:4])))
            step = {name: waiting[name][len(done.get(name, ())) :][: rng.choice([1, 1, 3, 12])] for name in chosen}
            for name, logits in harness.step(step).items():
                done[name] = torch.cat((done[name], logits)) if name in done else logits
                if len(done[name]) == len(waiting[name]):
                    harness.free(name)
        for name, tokens in waiting.items():
            self._compare(done[name], self.reference(tokens), f"{name} of {len(tokens)} tokens in mixed batches")

    def test_runs_are_repeatable(self) -> None:
        harness, tokens = self._harness(), self._tokens(2)
        assert torch.equal(harness.run(tokens), harness.run(tokens)), "two equal runs differ in bits"

    def test_tensor_parallel(self, ranks: int) -> None:
        """Every rank computes what one alone computes."""
        for gather in (False, True):
            self._check_ranks(ranks, 1, gather)

    def test_pipeline_parallel(self, stages: int) -> None:
        """The last stage computes what one rank alone computes. A model that is no stage is whole wherever it is."""
        if not self.target.supports_pipeline:
            whole = self._build(self.model_config(), torch.device("meta")).num_parameters
            for rank in ThreadedParallel.make(1, stages):
                held = self._build(self.model_config(), torch.device("meta"), rank).num_parameters
                assert held == whole, f"supports_pipeline is false, but stage {rank.stage} holds {held} of {whole}"
            return
        self._check_ranks(1, stages)
        for ranks in self.tensor_parallel[:1]:
            self._check_ranks(ranks, stages)

    def _check_ranks(self, ranks: int, stages: int, gather: bool = False) -> None:
        tokens = self._tokens(3)
        expected = self.reference(tokens)

        def work(rank: Parallel) -> torch.Tensor:
            return self._harness(parallel=rank, gather=gather).run(tokens, chunk=10)

        last = ThreadedParallel.run(ranks, work, stages)[-ranks:]
        for rank, result in enumerate(last):
            what = f"rank {rank} of {ranks}{', gather' if gather else ''}"
            what += "" if stages == 1 else f" of the last of {stages} stages"
            self._compare(result, expected, what)
            assert torch.equal(result, last[0]), f"the logits of {what} differ in bits from rank 0's"

    def test_each_rank_holds_a_part(self, ranks: int) -> None:
        """`num_parameters` is what a rank holds: less than all, and together at least all."""
        whole = sum(tensor.numel() for _, tensor in self.weights())
        layouts = [(ranks, 1), *((1, stages) for stages in self.pipeline_parallel if self.target.supports_pipeline)]
        for size, stages in layouts:
            held = [
                self._build(self.model_config(), torch.device("meta"), rank).num_parameters
                for rank in ThreadedParallel.make(size, stages)
            ]
            assert max(held) < whole <= sum(held), (
                f"num_parameters of {size} ranks x {stages} stages are {held}, the weights have {whole} values"
            )

    def test_bfloat16_follows(self) -> None:
        tokens = self._tokens(4)
        result = self._harness(dtype="bfloat16").run(tokens, chunk=11)
        self._compare(result, self.reference(tokens), "bfloat16", self.bf16_tolerance)

    def test_logits_of_some_rows(self) -> None:
        """The engine asks for logits of some positions only, in float32 whatever the model computes in."""
        config, model = self.model_config(), self._harness().model
        hidden = torch.randn(6, config.hidden_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            logits, some, none = model.logits(hidden), model.logits(hidden[[4, 1]]), model.logits(hidden[:0])
        assert logits.shape == (6, config.vocab_size) and none.shape == (0, config.vocab_size), (
            f"logits of 6 rows are {list(logits.shape)}, of none {list(none.shape)}; vocabulary {config.vocab_size}"
        )
        assert logits.dtype == torch.float32, f"logits are in {logits.dtype}"
        self._compare(some, logits[[4, 1]], "logits of two of six rows")

    # ── Declarations ────────────────────────────────────────────────────────────────────────────────────────────

    def test_attention_is_used_as_declared(self) -> None:
        config = self.model_config()
        for size in (1, *self.tensor_parallel):
            for rank, found in enumerate(ThreadedParallel.run(size, self._watch_attention)):
                self._check_use(self.target.attention_specs(config, size, rank), found, size)

    def _watch_attention(self, rank: Parallel) -> list[tuple[int, list[tuple[int, ...]]]]:
        """(layer, shapes of query, key and value) of every call in one forward pass."""
        found: list[tuple[int, list[tuple[int, ...]]]] = []

        class Watching(ForwardContext):
            def attend(self, layer: int, *given: torch.Tensor) -> torch.Tensor:
                found.append((layer, [tuple(tensor.shape) for tensor in given]))
                return super().attend(layer, *given)

            def attend_turned(self, layer: int, *given: Any) -> torch.Tensor:
                found.append((layer, [tuple(tensor.shape) for tensor in given[:3]]))
                return super().attend_turned(layer, *given)

        self._harness(parallel=rank, context=Watching).run(self._tokens(5)[:5])
        return found

    def _check_use(self, specs: list[AttentionSpec], found: list[tuple[int, list[tuple[int, ...]]]], size: int) -> None:
        layers = [layer for layer, _ in found]
        assert sorted(layers) == list(range(len(specs))), (
            f"attention_specs declares {len(specs)} layers, a forward pass attends in layers {layers}"
        )
        for layer, shapes in found:
            spec = specs[layer]
            query, keys = (5, spec.num_heads, spec.head_size), (5, spec.num_kv_heads, spec.head_size)
            assert shapes == [query, keys, keys], (
                f"layer {layer} of a rank of {size} attends with query, key, value {shapes}, declared is {spec}"
            )

    def test_num_parameters(self) -> None:
        expected = sum(tensor.numel() for _, tensor in self.weights())
        before = self._build(self.model_config(), torch.device("cpu")).num_parameters
        assert before == expected, f"num_parameters is {before} before loading, the weights have {expected} values"
        after = self._harness().model.num_parameters
        assert after == expected, f"num_parameters is {after} after loading, the weights have {expected} values"

    def test_builds_without_storage(self) -> None:
        """On device `meta` no weight is allocated, so the memory of a model can be told before there is any."""
        config, meta = self.model_config(), torch.device("meta")
        expected = sum(tensor.numel() for _, tensor in self.weights())
        found = self._build(config, meta).num_parameters
        assert found == expected, f"num_parameters is {found} on meta, the weights have {expected} values"
        size = 1 << 20  # an embedding of this many rows cannot hide among small tables
        wide = msgspec.structs.replace(config, vocab_size=size, raw={**config.raw, "vocab_size": size})
        with _AllocationWatch() as watch:  # type: ignore[no-untyped-call]
            self._build(wide, meta)
        assert watch.nbytes < size, f"{watch.nbytes} bytes are allocated on real devices, with a vocabulary of {size}"

    # ── Loading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def test_loads_in_any_order(self, seed: int) -> None:
        tokens = self._tokens(6)
        weights = shuffled(self.weights(), random.Random(seed))
        before = [tensor.clone() for _, tensor in weights]
        result = self._harness(weights=weights).run(tokens)
        assert torch.equal(result, self._harness().run(tokens)), "the order of the tensors changes the result"
        for (name, tensor), value in zip(weights, before, strict=True):
            assert torch.equal(tensor, value), f"loading or running wrote into the checkpoint's tensor {name}"

    def test_missing_tensors_are_named(self, seed: int) -> None:
        weights = self.weights()
        for name in {weights[0][0], weights[-1][0], random.Random(seed).choice(weights)[0]}:
            self._check_refused([(other, tensor) for other, tensor in weights if other != name], [name], "is missing")

    def test_unexpected_tensors_are_named(self, seed: int) -> None:
        weights = self.weights()
        name = random.Random(seed).choice(weights)[0].rpartition(".")[0] + ".no_such_tensor"
        self._check_refused([*weights, (name, torch.zeros(3))], [name], "is unexpected")

    def test_misshapen_tensors_are_named(self, seed: int) -> None:
        weights = self.weights()
        place = random.Random(seed).randrange(len(weights))
        name, tensor = weights[place]
        longer = torch.cat((tensor, tensor[:1]))
        for wrong in (longer, tensor[:-1], tensor[..., None], longer.transpose(0, -1)):
            self._check_refused([*weights[:place], (name, wrong), *weights[place + 1 :]], [name], f"is {wrong.shape}")

    def test_all_problems_are_named_at_once(self, seed: int) -> None:
        weights = self.weights()
        if len(weights) < 2:
            skip("the model has one tensor only")
        missing, misshapen = random.Random(seed).sample(range(len(weights)), 2)
        wrong = [(name, tensor[:-1] if place == misshapen else tensor) for place, (name, tensor) in enumerate(weights)]
        del wrong[missing]
        wrong.append(("no.such.tensor", torch.zeros(1)))
        names = [weights[missing][0], weights[misshapen][0], "no.such.tensor"]
        self._check_refused(wrong, names, "is missing, misshapen or unexpected")

    def _check_refused(self, weights: Weights, names: Sequence[str], problem: str) -> None:
        try:
            self._harness(weights=weights)
        except CheckpointError as error:
            unnamed = [name for name in names if name not in str(error)]
            assert not unnamed, f"the error does not name {unnamed}, which {problem}: {error}"
        else:
            raise AssertionError(f"weights are accepted in which {', '.join(names)} {problem}")

    # ── Making cases ────────────────────────────────────────────────────────────────────────────────────────────

    def _tokens(self, seed: int) -> list[int]:
        return random.Random(seed).choices(range(self.model_config().vocab_size), k=self.num_tokens)

    def _transformers_model(self) -> Any:
        if self.reference_model is None:
            type(self).reference_model = random_model(self.transformers_config())
        return self.reference_model

    def _harness(
        self,
        *,
        weights: Iterable[tuple[str, torch.Tensor]] | None = None,
        dtype: str = "float32",
        parallel: Parallel | None = None,
        gather: bool = False,
        context: MakeContext = ForwardContext,
    ) -> ModelHarness:
        return ModelHarness(
            self.target,
            self.model_config(),
            iter(self.weights() if weights is None else weights),
            **self.over,
            dtype=dtype,
            parallel=parallel,
            gather=gather,
            max_model_len=2 * self.num_tokens,
            context=context,
        )

    def _build(self, config: ModelConfig, device: torch.device, parallel: Parallel | None = None) -> Model:
        kernels = Kernels(Kernels.Options(), KernelSpec("float32", device.type))
        context = BuildContext(kernels, parallel or Parallel(), torch.float32, device, 2 * self.num_tokens)
        made: Model = self.target(config, context)
        return made

    def _compare(self, result: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float | None = None) -> None:
        tolerance = tolerance or self.tolerance
        assert result.dtype == torch.float32, f"logits are in {result.dtype}"
        assert result.shape == expected.shape, f"{what}: {list(result.shape)} instead of {list(expected.shape)}"
        errors = torch.where(result.isfinite(), (result - expected).abs(), torch.inf).amax(-1) / expected.abs().amax()
        assert errors.amax() <= tolerance, (
            f"{what}: relative error {errors.amax():.3g}, allowed {tolerance}; first at token "
            f"{int((errors > tolerance).nonzero()[0])} of {len(errors)}"
        )


def random_model(config: Any, seed: int = 0) -> Any:
    """The transformers model of a configuration, in float32, every parameter random and of a size that shows."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
            else:  # norms and biases: ones and zeros at first, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


class _AllocationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operations put on real devices."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.nbytes += sum(_real_bytes(leaf) for leaf in tree_leaves(result))
        return result


def _real_bytes(found: Any) -> int:
    return found.nbytes if isinstance(found, torch.Tensor) and found.device.type != "meta" else 0
