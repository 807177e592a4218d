"""llama.cpp: `llamacpp.py MODEL.gguf`, through the C API of llama-cpp-python, batching as its server does.

Each step has one token of every running sequence and, as far as the batch of 512 tokens allows, prompt tokens of
waiting ones. Its best setting here: flash attention, one cache stream per sequence. Such streams are batched together
only while their numbers are consecutive, so a sequence that ends hands its number to the last one.
"""

import ctypes
import os
import sys

import llama_cpp as llama
import numpy as np
from common import serve

BATCH = 512
STREAMS = 64
CELLS = 1536


class Context:
    """One context and its batch, filled by arrays."""

    def __init__(self, model: object, streams: int, cells: int) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = cells * streams, BATCH, BATCH, streams
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.flash_attn_type, params.kv_unified, params.no_perf = 1, streams == 1, True
        self.context = llama.llama_init_from_model(model, params)
        self.memory = llama.llama_get_memory(self.context)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.batch = llama.llama_batch_init(BATCH, 0, 1)
        view = np.ctypeslib.as_array
        self.token, self.position = view(self.batch.token, (BATCH,)), view(self.batch.pos, (BATCH,))
        self.wanted = view(self.batch.logits, (BATCH,))
        view(self.batch.n_seq_id, (BATCH,))[:] = 1
        self.sequence = [view(self.batch.seq_id[i], (1,)) for i in range(BATCH)]
        self.size = 0

    def put(self, token: int, position: int, sequence: int, wanted: bool) -> None:
        at = self.size
        self.token[at], self.position[at], self.wanted[at] = token, position, wanted
        self.sequence[at][0] = sequence
        self.size += 1

    def run(self, outputs: int) -> list[int]:
        """Decode the batch; the greedy tokens of the rows that were wanted."""
        self.batch.n_tokens, self.size = self.size, 0
        if llama.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        if not outputs:
            llama.llama_synchronize(self.context)
            return []
        pointer = ctypes.cast(
            llama.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float * (outputs * self.vocab))
        )
        logits = np.frombuffer(pointer.contents, dtype=np.float32).reshape(outputs, self.vocab)
        return [int(token) for token in logits.argmax(1)]


class Running:
    """A sequence under way."""

    def __init__(self, prompt: list[int], length: int) -> None:
        self.prompt, self.left = prompt, length
        self.done = 0  # tokens in the cache
        self.last = -1


def generate(context: Context, streams: int, prompts: list[list[int]], max_tokens: list[int]) -> int:
    llama.llama_memory_clear(context.memory, False)
    waiting = [Running(p, n) for p, n in zip(prompts, max_tokens, strict=True)][::-1]
    running: list[Running] = []
    total = 0
    while waiting or running:
        while waiting and len(running) < streams:
            running.append(waiting.pop())
        outputs = []
        for number, sequence in enumerate(running):
            if sequence.last >= 0:
                context.put(sequence.last, sequence.done, number, True)
                sequence.done += 1
                outputs.append(sequence)
        for number, sequence in enumerate(running):
            if sequence.last < 0:
                part = min(BATCH - context.size, len(sequence.prompt) - sequence.done)
                for token in sequence.prompt[sequence.done : sequence.done + part]:
                    sequence.done += 1
                    context.put(token, sequence.done - 1, number, sequence.done == len(sequence.prompt))
                if part and sequence.done == len(sequence.prompt):
                    outputs.append(sequence)
        for sequence, token in zip(outputs, context.run(len(outputs)), strict=True):
            sequence.last = token
            sequence.left -= 1
            total += 1
        for number in reversed([n for n, sequence in enumerate(running) if sequence.left == 0]):
            _end(context, running, number)
    return total


def _end(context: Context, running: list[Running], number: int) -> None:
    """Sequence `number` is over; the last one takes its place."""
    last = len(running) - 1
    llama.llama_memory_seq_rm(context.memory, number, -1, -1)
    if number != last:
        llama.llama_memory_seq_cp(context.memory, last, number, -1, -1)
        llama.llama_memory_seq_rm(context.memory, last, -1, -1)
        running[number] = running[last]
    running.pop()


if __name__ == "__main__":
    llama.llama_backend_init()
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, None)
    loaded = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
    alone, together = Context(loaded, 1, CELLS), Context(loaded, STREAMS, CELLS)

    def run(prompts: list[list[int]], max_tokens: list[int]) -> int:
        one = len(prompts) == 1
        return generate(alone if one else together, 1 if one else STREAMS, prompts, max_tokens)

    serve(f"llama.cpp ({llama.__version__}) {os.path.basename(sys.argv[1])}", run, lambda: None)
