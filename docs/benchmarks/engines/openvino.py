"""OpenVINO GenAI, continuous batching: `openvino.py MODEL.gguf` (or a directory in OpenVINO's form)."""

import os
import sys

from common import serve

# This file has the library's name, and Python looks for modules beside the script first.
sys.path = [path for path in sys.path if not path.endswith("engines")]
sys.modules.pop("openvino", None)

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402

if __name__ == "__main__":
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 4  # GB, taken as needed
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = 256
    scheduler.enable_prefix_caching = "prefix" in sys.argv[2:]
    pipeline = genai.ContinuousBatchingPipeline(
        sys.argv[1], scheduler, "CPU", {"INFERENCE_NUM_THREADS": os.cpu_count()}
    )
    count = 0

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> int:
        global count
        handles = []
        for prompt, length in zip(prompts, max_tokens, strict=True):
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = length
            config.ignore_eos, config.do_sample = True, False
            count += 1
            handles.append(pipeline.add_request(count, ov.Tensor(np.array([prompt], dtype=np.int64)), config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return sum(len(handle.read_all()[0].generated_ids) for handle in handles)

    serve(f"OpenVINO GenAI {genai.__version__}", generate, lambda: None)
