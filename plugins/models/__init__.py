"""Built-in models, named by their Hugging Face architecture string."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl

_MODELS = (
    ("LlamaForCausalLM", "llama", "Llama 1 to 3.x and models of its shape (SmolLM2, …)"),
    ("MistralForCausalLM", "llama", "Mistral, with its sliding window"),
    ("Qwen2ForCausalLM", "qwen", "Qwen 2 and 2.5"),
    ("Qwen3ForCausalLM", "qwen", "Qwen 3, dense"),
    ("Gemma3ForCausalLM", "gemma3", "Gemma 3, text only"),
)


@hookimpl
def interlace_models() -> Iterable[Provider]:
    for name, module, summary in _MODELS:
        yield Provider(name=name, target=f"interlace.plugins.models.{module}:{name}", summary=summary, api="1")
