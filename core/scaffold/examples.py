"""What the generated plugin of each kind does, in words, and how its README tells to select it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Example(NamedTuple):
    """The words about one kind's generated plugin."""

    summary: str
    """Of its provider, shown by `interlace plugins list`."""
    about: str
    """For the README: sentences."""
    select: str
    """For the README: a template, in Markdown."""


def _in_section(section: str, option: str) -> str:
    """Selection by `use`, with an option."""
    return f"""In a configuration file:

```toml
[{section}]
use = "${{name}}"

[{section}.options.${{name}}]
{option}
```
"""


EXAMPLES: Mapping[str, Example] = {
    "models": Example(
        "Granite: Llama with four multipliers",
        "As generated, it is the architecture of Granite 3: Llama with scaled embeddings, attention, residuals and "
        "logits. Make of it what your checkpoints need.",
        'By itself, for every checkpoint whose config.json says `"architectures": ["${name}"]`.',
    ),
    "schedulers": Example(
        "least work first, waiting makes up for work",
        "The request with the least work comes first, and waiting makes up for work, so that none waits for ever.",
        _in_section("scheduler", "tokens_per_second = 100"),
    ),
    "orderings": Example(
        "short prompts first, in buckets",
        "Short prompts come before long ones; those of about the same length are equal to it.",
        """Alone or with others, by a scheduler that combines orderings:

```toml
[scheduler]
use = "ordered"

[scheduler.options.ordered]
order = ["${name}", "fcfs"]
```
""",
    ),
    "attention": Example(
        "one sequence after the other, in plain torch",
        "Paged attention in plain torch, one sequence after the other: slow, right, and easy to change.",
        _in_section("attention", "max_queries = 256"),
    ),
    "executors": Example(
        "one worker in a thread of its own",
        "One worker in a thread of its own, so that the engine is free while a step runs.",
        _in_section("executor", "cores = []"),
    ),
    "checkpoints": Example(
        "directory with config.json, tokenizer files and weights.npz",
        "It reads a directory with config.json, tokenizer files, and all weights in one NumPy archive, weights.npz.",
        "By itself, for every directory with a `weights.npz`; or by name:\n\n"
        + _in_section("checkpoint", 'prefix = "model."').partition("\n\n")[2],
    ),
    "kernels": Example(
        "norm and activations in place, in plain torch",
        "It does the norm and the activations with fewer temporary tensors; other ops stay with the other kernel sets.",
        _in_section("kernels", "in_place = true"),
    ),
    "logits_processors": Example(
        "top-a: the surer the model is, the fewer tokens remain",
        "It excludes tokens less probable than strength * p², p being the probability of the most probable one.",
        """In a configuration file:

```toml
[logits_processors]
use = ["${name}"]
```

and then in the requests that want it: `SamplingParams(logits_processors={"${name}": {"strength": 0.5}})`.
""",
    ),
    "routers": Example(
        "requests with the same label go to the same replica",
        "Requests with the same label (such as the user) go to the same replica, unless that is too busy.",
        _in_section("router", 'label = "user"').rstrip() + "\n\nIt has a say where `engine.replicas` is more than 1.\n",
    ),
}
"""By kind."""
