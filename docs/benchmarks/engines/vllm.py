"""vLLM on CPU: `vllm.py MODEL_DIRECTORY [eager]`.

Its best setting on two cores: VLLM_CPU_OMP_THREADS_BIND=0-1, VLLM_CPU_KVCACHE_SPACE=4, and LD_PRELOAD of tcmalloc and
libiomp5, as its documentation advises."""

if __name__ == "__main__":  # the engine's own processes import this file again
    import sys

    from common import serve

    # This file has the library's name, and Python looks for modules beside the script first.
    sys.path = [path for path in sys.path if not path.endswith("engines")]

    import vllm

    llm = vllm.LLM(
        model=sys.argv[1],
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=256,
        enforce_eager="eager" in sys.argv[2:],
        enable_prefix_caching=True,
    )

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> int:
        params = [
            vllm.SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, detokenize=False)
            for length in max_tokens
        ]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    serve(f"vLLM {vllm.__version__}", generate, llm.reset_prefix_cache)
