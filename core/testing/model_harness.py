"""`ModelHarness`: run a model over a paged KV cache without an engine; for tests of models, kernels and attention.

    harness = ModelHarness(MyModel, config, weights)        # over the reference attention and kernels, or others
    logits = harness.step({"a": [1, 2, 3], "b": [7]})       # a mixed batch; logits of every token, by sequence
    logits = harness.step({"a": [4]})                       # sequences go on where they were
    logits = harness.run([1, 2, 3, 4, 5], chunk=2)          # a fresh sequence, chunk by chunk

The cache is filled with NaN, blocks are handed out in random order, and blocks that fell out of a sliding window are
taken away, so a model or backend that reads what it must not shows it at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from interlace.interfaces.attention import AttentionBackend
from interlace.interfaces.kernels import Kernels, KernelSpec, StepProgram
from interlace.interfaces.model import BuildContext, ForwardContext, LayerCache, Model, Parallel
from interlace.interfaces.weights import BlockWeight, decode_all
from interlace.kv.specs import group_layers
from interlace.model_config import ModelConfig
from interlace.testing.paging import Pager
from interlace.testing.reference import ReferenceAttention

Result = TypeVar("Result")


class ModelHarness:
    """One model on one rank with a KV cache of `num_blocks` blocks. Sequences are named by the caller."""

    def __init__(
        self,
        model: type[Model],
        config: ModelConfig,
        weights: Iterable[tuple[str, torch.Tensor | BlockWeight]],
        *,
        attention: type[AttentionBackend] = ReferenceAttention,
        kernels: type[Kernels] = Kernels,
        dtype: str = "float32",
        device: str = "cpu",
        kept_weights: str = "auto",
        parallel: Parallel | None = None,
        block_size: int = 4,
        num_blocks: int = 512,
        max_model_len: int = 256,
        context: Callable[[list[LayerCache], list[Any]], ForwardContext] = ForwardContext,
        program: bool = False,
    ) -> None:
        """`context` makes the state each step is given, for tests that watch what a model does with it. `program`: run
        steps as the kernels' step program; raises `ValueError` with their reason if they make none."""
        parallel = parallel or Parallel()
        self._context = context
        build = BuildContext(
            kernels=kernels(kernels.Options(), KernelSpec(dtype, device, kept_weights)),
            parallel=parallel,
            dtype=getattr(torch, dtype),
            device=torch.device(device),
            max_model_len=max_model_len,
        )
        with torch.inference_mode():
            self.model = model(config, build)
            self.model.load_weights(weights if model.takes_blocks else decode_all(weights))
        specs = model.attention_specs(config, parallel.size, parallel.rank)
        self.groups = group_layers([spec.kv_key for spec in specs])
        self._backends, self._layers = [], dict[int, LayerCache]()
        caches: dict[int, torch.Tensor] = {}  # cache tensor by its number, shared by the groups
        for number, group in enumerate(self.groups):
            spec = specs[group.layers[0]]
            backend = attention(attention.Options(), spec, block_size, dtype, device)
            self._backends.append(backend)
            layout = backend.cache_layout(num_blocks)
            for j, layer in enumerate(group.layers):
                if j not in caches:
                    caches[j] = torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device=device)
                    caches[j].fill_(torch.nan)
                self._layers[layer] = LayerCache(backend, caches[j].view(layout.shape), number)
        windows = [group.window for group in self.groups]
        self._pager = Pager(windows, block_size, num_blocks, max_model_len, device)
        self._program: StepProgram | None = None
        if program:
            layers = [self._layers[layer] for layer in range(len(self._layers))]
            with torch.inference_mode():
                made = build.kernels.compile_step(self.model, layers, max_model_len, max_model_len)
            if isinstance(made, str):
                raise ValueError(f"no step program: {made}")
            self._program = made

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Run one batch: the next tokens of some sequences. Returns each one's logits [tokens, vocab] in float32."""
        with torch.inference_mode():
            batch = self._pager.next_batch(tokens)
            if self._program is not None:
                logits = self._program.run(batch, range(batch.num_tokens))[1].clone()
                return dict(zip(tokens, logits.split(batch.query_lens), strict=True))  # type: ignore[no-untyped-call]
            metadata = [backend.prepare(batch, number) for number, backend in enumerate(self._backends)]
            ctx = self._context([self._layers[layer] for layer in range(len(self._layers))], metadata)
            output = self.model.forward(batch.token_ids, batch.positions, ctx)
            logits = self.model.logits(output.hidden)
        return dict(zip(tokens, logits.split(batch.query_lens), strict=True))  # type: ignore[no-untyped-call]

    def run(self, token_ids: Sequence[int], chunk: int | None = None) -> torch.Tensor:
        """Logits [tokens, vocab] of one fresh sequence, `chunk` tokens a step (default: all at once)."""
        chunk = chunk or len(token_ids)
        parts = [self.step({"": token_ids[start : start + chunk]})[""] for start in range(0, len(token_ids), chunk)]
        self.free("")
        return torch.cat(parts)

    def generate(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy continuation of one fresh sequence."""
        output: list[int] = []
        new = list(token_ids)
        while len(output) < max_tokens:
            new = [int(self.step({"": new})[""][-1].argmax())]
            output += new
        self.free("")
        return output

    def free(self, name: str) -> None:
        """Forget a sequence and take its blocks back."""
        self._pager.free(name)


class ThreadedParallel(Parallel):
    """Tensor parallelism among threads of one process, for tests.

    `ThreadedParallel.run(2, work)` calls `work(rank)` for both ranks, each in a thread of its own."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank = rank
        self.size = size
        self._barrier = barrier
        self._board = board

    @classmethod
    def run(cls, size: int, work: Callable[[Parallel], Result]) -> list[Result]:
        """The results of all ranks. If one raises, the others are not left waiting, and its error is raised here."""
        barrier, board = threading.Barrier(size, timeout=60), [None] * size
        ranks = [cls(rank, size, barrier, board) for rank in range(size)]
        results: dict[int, Result] = {}
        errors: list[Exception] = []

        def run_rank(rank: ThreadedParallel) -> None:
            try:
                results[rank.rank] = work(rank)
            except Exception as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
            raise (causes or errors)[0]
        return [results[rank] for rank in range(size)]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=-1)

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._board[self.rank] = x
        self._barrier.wait()
        everyone: list[torch.Tensor] = list(self._board)
        self._barrier.wait()  # nobody may post again before all have read
        return everyone
