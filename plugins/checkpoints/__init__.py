"""Built-in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_checkpoints() -> Iterable[Provider]:
    """`safetensors`, `gguf` and `dummy`."""
    package = "interlace.plugins.checkpoints"
    return (
        Provider(
            name="safetensors",
            target=f"{package}.safetensors:SafetensorsCheckpoint",
            summary="Hugging Face directory: config.json, tokenizer files, .safetensors weights or shards",
            api="1",
        ),
        Provider(
            name="gguf",
            target=f"{package}.gguf:GgufCheckpoint",
            summary="GGUF file or shards, with configuration, tokenizer and quantised weights in it",
            api="1",
        ),
        Provider(
            name="dummy",
            target=f"{package}.dummy:DummyCheckpoint",
            summary="random weights for a config.json; only when selected by name",
            api="1",
        ),
    )
