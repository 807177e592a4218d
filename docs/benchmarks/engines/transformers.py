"""transformers: `transformers.py MODEL_DIRECTORY`; one `generate` per request, since its padding batches cannot have
outputs of different lengths."""

import sys

from common import serve

# This file has the library's name, and Python looks for modules beside the script first.
sys.path = [path for path in sys.path if not path.endswith("engines")]
sys.modules.pop("transformers", None)

import torch  # noqa: E402
import transformers  # noqa: E402

if __name__ == "__main__":
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], max_tokens: list[int]) -> int:
        total = 0
        for prompt, length in zip(prompts, max_tokens, strict=True):
            ids = torch.tensor([prompt])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
            total += output.shape[1] - len(prompt)
        return total

    serve(f"transformers {transformers.__version__}", generate, lambda: None)
