"""Tokenizers and an assembly small enough to read, for tests of the user's side of the engine."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from interlace.assemble import Assembly
from interlace.clock import Clock, VirtualClock
from interlace.config import load_settings
from interlace.engine.client import EngineClient
from interlace.model_config import ModelConfig
from interlace.plugin_manager import PluginManager
from interlace.spec import Component, ResolvedSpec
from interlace.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """Byte-level, without merges: ids 0-255 are the bytes, in the alphabet's order; 256 is `<|end|>`, the EOS token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, name="bytes", eos_token_ids=(256,), chat_template=chat_template)


def byte_fallback_tokenizer(strip_leading_space: bool = True) -> Tokenizer:
    """SentencePiece style: single ASCII letters with and without a space before them; all else by byte fallback."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"
    for piece in ("▁", *letters, *(f"▁{letter}" for letter in letters)):
        vocab[piece] = len(vocab)
    merges = [("▁", letter) for letter in letters]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    chain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip_leading_space:
        backend.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        chain.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(chain)
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, name="byte fallback", eos_token_ids=(1,))


def front_spec(
    vocab_size: int, *, max_model_len: int = 128, seed: int | None = 0, logits_processors: tuple[Component, ...] = ()
) -> ResolvedSpec:
    """A spec with the little that the front reads of it; its components do not exist."""

    def component(kind: str, name: str = "fake") -> Component:
        return Component(kind=kind, name=name, target="nowhere:Nothing", reason="for a test")

    config = ModelConfig(
        architecture="FakeForCausalLM",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=8,
        norm_eps=1e-6,
        max_position_embeddings=max_model_len,
    )
    return ResolvedSpec(
        model="fake",
        model_path="nowhere",
        model_config=config,
        checkpoint=component("checkpoints"),
        architecture=component("models", "FakeForCausalLM"),
        scheduler=component("schedulers"),
        executor=component("executors"),
        attention=(),
        kernels=(),
        logits_processors=logits_processors,
        max_model_len=max_model_len,
        seed=seed,
    )


def fake_assembly(
    client: EngineClient,
    *,
    tokenizer: Tokenizer | None = None,
    spec: ResolvedSpec | None = None,
    clock: Clock | None = None,
    subscribers: tuple[object, ...] = (),
) -> Assembly:
    """An assembly of a client, by default with `byte_tokenizer`; `subscribers` are objects with event hooks."""
    loaded = load_settings(env={})
    clock = clock or VirtualClock()
    tokenizer = tokenizer or byte_tokenizer()
    spec = spec or front_spec(tokenizer.vocab_size)
    plugins = PluginManager(loaded.settings, subscribers, clock)
    return Assembly(loaded, spec, plugins, tokenizer, client, clock)
