"""The conformance suite of models: all built-in ones pass it, models that are wrong on purpose do not."""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from interlace.errors import PluginNotFoundError
from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.model import BuildContext, Model, ModelOutput, Parallel
from interlace.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from interlace.layers.weights import WeightTable
from interlace.model_config import ModelConfig
from interlace.plugins.models.llama import LlamaForCausalLM
from interlace.testing.conformance import failures
from interlace.testing.model_suite import ModelConformance
from interlace.testing.reference import dense_attention

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class BuiltIn(ModelConformance):
    """Over the built-in attention and kernels, so that what ships together is tested together."""

    attention = "torch"
    kernels = "torch"
    seeds = range(2)


class TestLlama(BuiltIn):
    model = "LlamaForCausalLM"

    def transformers_config(self):
        return LlamaConfig(**TINY)


class TestMistral(BuiltIn):
    model = "MistralForCausalLM"

    def transformers_config(self):
        return MistralConfig(**TINY, sliding_window=10)


class TestQwen2(BuiltIn):
    model = "Qwen2ForCausalLM"

    def transformers_config(self):
        windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
        return Qwen2Config(**TINY, **windows, tie_word_embeddings=True)


class TestQwen3(BuiltIn):
    model = "Qwen3ForCausalLM"

    def transformers_config(self):
        return Qwen3Config(**{**TINY, "head_dim": 16})


class TestGemma3(BuiltIn):
    model = "Gemma3ForCausalLM"

    def transformers_config(self):
        return Gemma3TextConfig(**{**TINY, "num_hidden_layers": 7}, sliding_window=8, query_pre_attn_scalar=24)


# ── The other switches of the built-in architectures ────────────────────────────────────────────────────────────────


@pytest.mark.slow
class TestLlamaTiedAndBiased(TestLlama):
    def transformers_config(self):
        return LlamaConfig(**TINY, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)


@pytest.mark.slow
class TestLlamaWithOneKvHead(TestLlama):
    def transformers_config(self):
        return LlamaConfig(**{**TINY, "num_key_value_heads": 1})


@pytest.mark.slow
class TestLlamaWithoutGrouping(TestLlama):
    def transformers_config(self):
        return LlamaConfig(**{**TINY, "num_key_value_heads": 4})


@pytest.mark.slow
class TestMistralWithoutWindow(TestMistral):
    def transformers_config(self):
        return MistralConfig(**TINY, sliding_window=None)


@pytest.mark.slow
class TestQwen2WithoutWindow(TestQwen2):
    def transformers_config(self):
        return Qwen2Config(**TINY)


@pytest.mark.slow
class TestQwen3WithWindowAndBias(TestQwen3):
    def transformers_config(self):
        windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
        return Qwen3Config(**TINY, **windows, attention_bias=True)


@pytest.mark.slow
class TestGemma3WithFinalSoftcap(TestGemma3):
    def transformers_config(self):
        types = ["full_attention", "sliding_attention", "full_attention"]
        return Gemma3TextConfig(**TINY, sliding_window=5, layer_types=types, final_logit_softcapping=3.0)


# ── An architecture that transformers does not know ─────────────────────────────────────────────────────────────────


class EchoForCausalLM(Model):
    """Each token attends, by its embedding, to those before it; the result is compared with all embeddings."""

    def __init__(self, config, build):
        super().__init__(config, build)
        self.table = WeightTable()
        self.embedding = VocabParallelEmbedding(build, self.table.at("embed"), config.vocab_size, config.hidden_size)
        self.head = VocabParallelHead(
            build, self.table.at("head"), config.vocab_size, config.hidden_size, self.embedding
        )

    @classmethod
    def attention_specs(cls, config, tensor_parallel=1, rank=0):
        return [AttentionSpec(config.num_heads, config.num_kv_heads, config.head_size)]

    @property
    def num_parameters(self):
        return self.table.num_parameters

    def load_weights(self, weights):
        self.table.load(weights)
        self.head.finish()

    def forward(self, token_ids, positions, ctx):
        hidden = self.embedding(token_ids)
        heads = hidden.view(len(hidden), self.config.num_heads, -1)
        return ModelOutput(hidden + ctx.attend(0, heads, heads, heads).flatten(1), {})

    def logits(self, hidden):
        return self.head(hidden)


class TestAnArchitectureWithItsOwnReference(ModelConformance):
    model = EchoForCausalLM
    tensor_parallel = ()
    seeds = range(2)

    def model_config(self):
        raw = {"architectures": ["EchoForCausalLM"], "vocab_size": 50, "hidden_size": 32, "intermediate_size": 1}
        return ModelConfig.from_hf(raw | {"num_hidden_layers": 1, "num_attention_heads": 4}, "the test")

    def weights(self):
        return [("embed.weight", torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))]

    def reference(self, token_ids):
        embedding = self.weights()[0][1]
        heads = embedding[token_ids].view(-1, 4, 8)
        attended = dense_attention(AttentionSpec(4, 4, 8), heads, heads, heads).flatten(1).float()
        return (embedding[token_ids] + attended) @ embedding.T


# ── Models that are wrong on purpose ────────────────────────────────────────────────────────────────────────────────


class IgnoresPositions(LlamaForCausalLM):
    def forward(self, token_ids, positions, ctx):
        return super().forward(token_ids, torch.arange(len(token_ids)), ctx)


class OtherScale(LlamaForCausalLM):
    @classmethod
    def attention_specs(cls, config, tensor_parallel=1, rank=0):
        return [
            AttentionSpec(spec.num_heads, spec.num_kv_heads, spec.head_size, scale=0.36)
            for spec in super().attention_specs(config, tensor_parallel, rank)
        ]


class OneSpecTooMany(LlamaForCausalLM):
    @classmethod
    def attention_specs(cls, config, tensor_parallel=1, rank=0):
        specs = super().attention_specs(config, tensor_parallel, rank)
        return [*specs, specs[0]]

    def build_layers(self, build, weights, specs):
        return super().build_layers(build, weights, dict(list(specs.items())[:-1]))


class WholeSpecs(LlamaForCausalLM):
    """Declares to each rank what one alone would have."""

    @classmethod
    def attention_specs(cls, config, tensor_parallel=1, rank=0):
        return super().attention_specs(config, 1)

    def build_layers(self, build, weights, specs):
        right = super().attention_specs(self.config, build.parallel.size, build.parallel.rank)
        return super().build_layers(build, weights, dict(enumerate(right)))


class Reduces(Parallel):
    """Forgets to add up."""

    def __init__(self, parallel):
        self.rank, self.size, self.all_gather = parallel.rank, parallel.size, parallel.all_gather


class SendsNoResidual(Parallel):
    """Half of what a stage hands on is lost."""

    def __init__(self, parallel):
        self.stage, self.num_stages, self.receive = parallel.stage, parallel.num_stages, parallel.receive
        self.send = lambda hidden, residual: parallel.send(hidden, torch.zeros_like(residual))


class LosesTheResidual(LlamaForCausalLM):
    def __init__(self, config, build):
        super().__init__(config, build._replace(parallel=SendsNoResidual(build.parallel)))


class BuildsEveryLayer(LlamaForCausalLM):
    """Claims to be a stage, and is the whole."""

    def build_layers(self, build, weights, specs):
        return super().build_layers(build, weights, dict(enumerate(self.attention_specs(self.config))))


class CountsTheWhole(LlamaForCausalLM):
    @property
    def num_parameters(self):
        alone = self.build._replace(parallel=Parallel())
        return LlamaForCausalLM(self.config, alone).num_parameters

    def __init__(self, config, build):
        self.build = build
        super().__init__(config, build)


class ForgetsAllReduce(LlamaForCausalLM):
    def __init__(self, config, build):
        super().__init__(config, build._replace(parallel=Reduces(build.parallel)))


class FailsOnOneRank(LlamaForCausalLM):
    def forward(self, token_ids, positions, ctx):
        if self._head._build.parallel.rank == 1:
            raise ValueError("rank 1 is out")
        return super().forward(token_ids, positions, ctx)


class MixesRows(LlamaForCausalLM):
    """A token sees what else is in its batch."""

    def forward(self, token_ids, positions, ctx):
        hidden, aux = super().forward(token_ids, positions, ctx)
        return ModelOutput(hidden + 0.01 * hidden.mean(0), aux)


class DropsUnknown(LlamaForCausalLM):
    def load_weights(self, weights):
        super().load_weights((name, tensor) for name, tensor in weights if "no" not in name.split(".")[-1])


class FillsIn(LlamaForCausalLM):
    def load_weights(self, weights):
        given = dict(weights)
        for name, entry in self._weights._entries.items():
            given.setdefault(name, torch.zeros(entry.shape))
        super().load_weights(given.items())


class Reshapes(LlamaForCausalLM):
    def load_weights(self, weights):
        entries = self._weights._entries
        super().load_weights(
            (
                name,
                t.reshape(entries[name].shape)
                if name in entries and t.numel() == math.prod(entries[name].shape)
                else t,
            )
            for name, t in weights
        )


class OtherError(LlamaForCausalLM):
    def load_weights(self, weights):
        given = dict(weights)
        super().load_weights((name, given.pop(name)) for name in self._weights._entries)


class WritesIntoTheFile(LlamaForCausalLM):
    def load_weights(self, weights):
        super().load_weights((name, tensor.mul_(2).div(2)) for name, tensor in weights)


class CountsItsShare(LlamaForCausalLM):
    @property
    def num_parameters(self):
        return super().num_parameters - 1


class AlwaysOnCpu(LlamaForCausalLM):
    def __init__(self, config, build: BuildContext):
        super().__init__(config, build)
        self.seen = torch.zeros(config.vocab_size, 2)  # counts of some kind, on no particular device


class NarrowLogits(LlamaForCausalLM):
    def logits(self, hidden):
        return super().logits(hidden).to(hidden.dtype).bfloat16()


class PaddedLogits(LlamaForCausalLM):
    def logits(self, hidden):
        return torch.nn.functional.pad(super().logits(hidden), (0, 3))


WRONG = [
    (IgnoresPositions, "test_one_sequence", "chunks of 1: relative error .* first at token"),
    (IgnoresPositions, "test_mixed", "sequence . of .* tokens in mixed batches"),
    (OtherScale, "test_one_sequence", "chunks of 29: relative error"),
    (OneSpecTooMany, "test_attention_is_used", "declares 4 layers, .* in layers"),
    (WholeSpecs, "test_attention_is_used", "a rank of 2 attends with|Error"),
    (ForgetsAllReduce, "test_tensor_parallel", "rank 0 of 2: relative error"),
    (LosesTheResidual, "test_pipeline_parallel", "rank 0 of 1 of the last of 2 stages: relative error"),
    (BuildsEveryLayer, "test_pipeline_parallel", "KeyError"),
    (CountsTheWhole, "test_each_rank_holds_a_part", r"num_parameters of 2 ranks x 1 stages are \[(\d+), \1\]"),
    (FailsOnOneRank, "test_tensor_parallel", "ValueError: rank 1 is out"),
    (MixesRows, "test_one_sequence", "relative error"),
    (DropsUnknown, "test_unexpected", "accepted in which .*no_such_tensor is unexpected"),
    (FillsIn, "test_missing", "accepted in which .* is missing"),
    (Reshapes, "test_misshapen", "accepted in which .* is torch.Size"),
    (OtherError, "test_missing", "KeyError"),
    (WritesIntoTheFile, "test_loads", "wrote into the checkpoint's tensor|the order"),
    (CountsItsShare, "test_num_parameters", "before loading"),
    (AlwaysOnCpu, "test_builds_without", "bytes are allocated on real devices"),
    (NarrowLogits, "test_logits", "in torch.bfloat16"),
    (PaddedLogits, "test_logits", r"\[6, 100\].*vocabulary 97"),
]


@pytest.mark.parametrize(
    ("wrong", "test", "message"), WRONG, ids=[f"{entry[0].__name__}-{entry[1]}" for entry in WRONG]
)
def test_wrong_models_fail(wrong, test, message):
    class Suite(ModelConformance):
        model = wrong
        seeds = range(3)

        def transformers_config(self):
            return LlamaConfig(**TINY)

    ((name, found),) = failures(Suite, only=test).items()
    assert name.startswith(test)
    assert re.search(message, found), found


def test_a_flat_reference_is_refused():
    class Suite(TestLlama):
        def reference(self, token_ids):
            return torch.ones(len(token_ids), 97)

    assert "the reference's logits are flat" in failures(Suite, only="worth")["test_reference_is_worth_comparing"]


def test_what_cannot_be_tested_is_said():
    with pytest.raises(PluginNotFoundError, match=r"called 'LamaForCausalLM' \(Suite\.model\).*Did you mean 'Llama"):
        failures(type("Suite", (ModelConformance,), {"model": "LamaForCausalLM"}))
    found = failures(type("Suite", (ModelConformance,), {"model": "LlamaForCausalLM"}), only="num_parameters")
    assert "write transformers_config in Suite" in found["test_num_parameters"]
