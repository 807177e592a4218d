"""All jobs of run.py, in their order."""

from __future__ import annotations

from gpu_jobs import Job

_BACKENDS = ("triton", "triton_invariant", "flash")
_QUICK_TESTS = {
    "triton": ("test_random_traffic", "test_decode_in_a_device_graph", "test_empty_batch"),
    "triton_invariant": ("test_batch_invariance_if_claimed",),
    "flash": ("test_random_traffic",),
}
_QUICK_KERNEL_TESTS = ("test_values",)
_MODELS = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")


def plan(device: str, quick: bool) -> list[Job]:
    """Without a GPU, the checks only, as small as they get."""
    return _interpreted_checks() if device == "cpu" else [*_checks(quick), *_measurements(quick)]


def _interpreted_checks() -> list[Job]:
    small = {"device": "cpu"}
    return [
        *(
            Job(
                f"attention.{name}",
                "gpu_checks:attention_suite",
                {**small, "backend": name, "seeds": [0], "quick": True, "tests": _QUICK_TESTS[name]},
            )
            for name in _BACKENDS
        ),
        Job("kernels", "gpu_checks:kernels_suite", {**small, "seeds": [0], "tests": _QUICK_KERNEL_TESTS}),
        Job("sampling", "gpu_checks:sampling", {**small, "seeds": [0], "vocab_sizes": [9000]}),
        Job("models", "gpu_checks:models", {**small, "dtypes": ["float32"]}),
        Job(
            "parity.Llama",
            "gpu_parity:parity",
            {**small, "architecture": _MODELS[0], **_ragged([19, 3], 3, ["triton"])},
        ),
    ]


def _checks(quick: bool) -> list[Job]:
    """The long ones first: they run side by side."""
    on = {"device": "cuda"}
    parts = [[0]] if quick else [[0, 1], [2, 3]]
    return [
        *(
            Job(
                f"attention.{name}.{number}",
                "gpu_checks:attention_suite",
                {**on, "backend": name, "seeds": seeds, "quick": quick},
                180,
            )
            for number, seeds in enumerate(parts)
            for name in _BACKENDS
        ),
        *(Job(f"shapes.{name}", "gpu_checks:attention_shapes", {**on, "backend": name}, 180) for name in _BACKENDS),
        *(
            Job(
                f"parity.{name.removesuffix('ForCausalLM')}",
                "gpu_parity:parity",
                {
                    **on,
                    "architecture": name,
                    **_ragged([1, 70, 17, 33, 2, 100, 64, 9, 31, 5], 24, _parity_backends(name)),
                },
                180,
            )
            for name in (_MODELS[:1] if quick else _MODELS)
        ),
        Job("kernels", "gpu_checks:kernels_suite", {**on, "seeds": list(range(1 if quick else 4))}, 180),
        Job(
            "sampling",
            "gpu_checks:sampling",
            {**on, "seeds": list(range(2 if quick else 12)), "vocab_sizes": [32000, 128256, 262144]},
            180,
        ),
        Job("models", "gpu_checks:models", {**on, "dtypes": ["float32", "float16", "bfloat16"]}, 180),
    ]


def _parity_backends(model: str) -> list[str]:
    """The comparison is in float32, in which `flash` refuses the windows of Gemma."""
    return [name for name in _BACKENDS if name != "flash" or not model.startswith("Gemma")]


def _ragged(lengths: list[int], max_tokens: int, backends: list[str]) -> dict[str, object]:
    return {"lengths": lengths, "max_tokens": max_tokens, "backends": backends}


def _measurements(quick: bool) -> list[Job]:
    sizes = [1, 64] if quick else [1, 16, 64, 256]
    return [
        Job("limits", "gpu_speed:limits", {"quick": quick}, 60, True),
        Job("speed.attention", "gpu_speed:attention", {"quick": quick}, 120, True),
        Job("speed.sampling", "gpu_speed:sampling", {"quick": quick}, 60, True),
        *(
            Job(f"speed.{name}", "gpu_model_speed:engine", {"name": name, "sizes": sizes, "quick": quick}, 150, True)
            for name in (("1B",) if quick else ("1B", "8B"))
        ),
        Job(
            "transformers.static", "gpu_peers:static_cache", {"name": "1B", "sizes": [1, 16], "quick": quick}, 110, True
        ),
        Job("transformers.continuous", "gpu_peers:continuous", {"name": "1B", "sizes": [16, 64]}, 90, True),
    ]
