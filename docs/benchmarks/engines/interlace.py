"""Interlace: `interlace.py MODEL [--flag value …]`, flags being settings by their dotted paths."""

import sys

from common import serve

# This file has the engine's name, and Python looks for modules beside the script first.
sys.path = [path for path in sys.path if not path.endswith("engines")]

from interlace import LLM, SamplingParams, __version__  # noqa: E402
from interlace.config import load_settings  # noqa: E402

if __name__ == "__main__":
    flags = sys.argv[2:]
    settings = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True))
    llm = LLM.from_loaded(load_settings({}, {"model": sys.argv[1], **settings}))

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> int:
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, progress=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    kept = next((text for subject, text in llm.front.report() if subject == "weights"), "")
    serve(f"Interlace {__version__} {kept}", generate, lambda: llm.front.control("reset_prefix_cache"))
