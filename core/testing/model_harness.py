"""`ModelHarness`: run a model over a paged KV cache without an engine; for tests of models, kernels and attention.

    harness = ModelHarness(MyModel, config, weights)        # over the reference attention and kernels, or others
    logits = harness.step({"a": [1, 2, 3], "b": [7]})       # a mixed batch; logits of every token, by sequence
    logits = harness.step({"a": [4]})                       # sequences go on where they were
    logits = harness.run([1, 2, 3, 4, 5], chunk=2)          # a fresh sequence, chunk by chunk

The cache is filled with NaN, blocks are handed out in random order, and blocks that fell out of a sliding window are
taken away, so a model or backend that reads what it must not shows it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from interlace.interfaces.attention import AttentionBackend
from interlace.interfaces.kernels import Kernels, KernelSpec, StepProgram
from interlace.interfaces.model import BuildContext, ForwardContext, LayerCache, Model, Parallel
from interlace.interfaces.weights import BlockWeight, decode_all
from interlace.kv.specs import group_layers
from interlace.model_config import ModelConfig
from interlace.testing.paging import Pager
from interlace.testing.reference import ReferenceAttention

MakeContext = Callable[[Mapping[int, LayerCache], Sequence[Any]], ForwardContext]


class ModelHarness:
    """One model on one rank with a KV cache of `num_blocks` blocks. Sequences are named by the caller.

    Several of them are the ranks of one model if each has its `parallel` (`interlace.testing.ranks`) and all are given
    the same batches at a time."""

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
        grain: int = 1,
        gather: bool = False,
        block_size: int = 4,
        num_blocks: int = 512,
        max_model_len: int = 256,
        context: MakeContext = ForwardContext,
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
            grain=grain,
            gather=gather,
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
        self._layers = {layer: self._layers[layer] for layer in parallel.layers_here(len(specs))}
        self._has_head = parallel.is_last_stage
        windows = [group.window for group in self.groups]
        self._pager = Pager(windows, block_size, num_blocks, max_model_len, device)
        self._program = self._compile(build.kernels, max_model_len) if program else None

    def _compile(self, kernels: Kernels, max_tokens: int) -> StepProgram:
        with torch.inference_mode():
            made = kernels.compile_step(self.model, list(self._layers.values()), max_tokens, max_tokens)
        if isinstance(made, str):
            raise ValueError(f"no step program: {made}")
        return made

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Run one batch: the next tokens of some sequences. Returns each one's logits [tokens, vocab] in float32; of a
        pipeline stage before the last, nothing for each."""
        with torch.inference_mode():
            batch = self._pager.next_batch(tokens)
            if self._program is not None:
                greedy = self._program.run_greedy(batch, range(batch.num_tokens))
                chosen = None if greedy is None else greedy[1][0].tolist()
                logits = self._program.run(batch, range(batch.num_tokens))[1].clone()
                assert chosen in (None, logits.argmax(1).tolist()), "`run_greedy` gives other tokens than `run`"
                return dict(zip(tokens, logits.split(batch.query_lens), strict=True))  # type: ignore[no-untyped-call]
            metadata = [backend.prepare(batch, number) for number, backend in enumerate(self._backends)]
            ctx = self._context(self._layers, metadata)
            hidden = self.model.forward(batch.token_ids, batch.positions, ctx).hidden
            if not self._has_head:
                assert not len(hidden), f"a stage before the last returned hidden states of {len(hidden)} tokens"
                return {name: torch.empty(0) for name in tokens}
            logits = self.model.logits(hidden)
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
