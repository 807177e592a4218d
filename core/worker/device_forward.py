"""`DeviceForward`: the device's side of a step. What is here only hands work to the device and never waits for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from interlace.interfaces.attention import AttentionBackend
from interlace.interfaces.kernels import Kernels
from interlace.interfaces.model import ForwardContext, LayerCache, Model
from interlace.kv.specs import NULL_BLOCK
from interlace.sampling.device import LogprobColumns, SamplingColumns
from interlace.sampling.params import MAX_LOGPROBS
from interlace.worker.batch import DecodeBatch, ForwardBatch
from interlace.worker.device_batch import Array, DeviceBatch, StepInputs
from interlace.worker.graphs import Ending, GraphKey
from interlace.worker.sampled import Sampled
from interlace.worker.step_buffers import Columns, Layout, Upload
from interlace.worker.streams import Stream, Work

_SAMPLING_TYPES: Mapping[str, str] = {
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "min_p": "float32",
    "seed": "int64",
    "sample_index": "int64",
    "position": "int64",
    "num_logprobs": "int32",
}


class Logits:
    """What a step computed that did not sample, on the device; there once the step is complete."""

    hidden: torch.Tensor  # [tokens, hidden], after the final norm; of decode steps not, if they run as graphs
    logits: torch.Tensor  # [rows that sample, vocab] float32; may have rows of padding behind them


class DeviceForward:
    """State that stays on the device between steps, and the steps' work over it.

    Per slot, and for one more, which padding rows stand for: the newest sampled token and the block tables."""

    def __init__(
        self,
        stream: Stream,
        model: Model,
        layers: Mapping[int, LayerCache],
        backends: Sequence[AttentionBackend],
        kernels: Kernels,
        batch: DeviceBatch,
        max_tokens: int,
        vocab_size: int,
        depth: int,
    ) -> None:
        """`depth`: host buffers of each kind: one more than steps may be under way."""
        self._model = model
        self._layers = layers
        self._backends = backends
        self._kernels = kernels
        self._groups = range(batch.num_groups)
        self._padding = {"token_slots": batch.max_num_seqs, "seq_lens": 1, "top_p": 1, "num_logprobs": -1}
        self._block_size = batch.block_size
        self._vocab_size = vocab_size
        rows, device = batch.max_num_seqs, stream.device
        self._device, self._max_num_seqs = device, rows
        self._fed = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._tables = [
            torch.full((rows + 1, batch.max_blocks), NULL_BLOCK, dtype=torch.int32, device=device) for _ in self._groups
        ]
        entries = 1 + min(MAX_LOGPROBS, vocab_size)
        self._sampled = Sampled(rows, entries, lambda size: torch.zeros(size, dtype=torch.uint8, device=device))
        self._hosts = [Sampled(rows, entries, stream.pinned) for _ in range(depth)]
        self._next_host = 0
        most = max(self._layout(rows, max_tokens, rows).num_bytes, self._decode_layout(rows).num_bytes)
        self._step = Upload(stream, most, depth)
        # Shared by all graphs, which never run at once: each fills it before it reads it.
        self._graph_tables: list[torch.Tensor] = []
        self._graph_logits: torch.Tensor | None = None
        self._news = Upload(stream, 4096, depth, grows=True)

    # ── what is sent ──────────────────────────────────────────────────────────────────────────────────────────

    def _token_columns(self, tokens: int) -> list[tuple[str, str, int]]:
        names = ["token_slots", "token_ids", "positions", *(f"slot_mapping.{group}" for group in self._groups)]
        return [(name, "int64", tokens) for name in names]

    def _decode_layout(self, rows: int) -> Layout:
        sampling = [(name, dtype, rows) for name, dtype in _SAMPLING_TYPES.items()]
        return Layout([*self._token_columns(rows), ("seq_lens", "int32", rows), *sampling])

    def _layout(self, rows: int, tokens: int, outputs: int) -> Layout:
        sampling = [(name, dtype, outputs) for name, dtype in _SAMPLING_TYPES.items()]
        lengths = [("slots", "int64", rows), ("seq_lens", "int32", rows), ("query_start", "int32", rows + 1)]
        places = [("outputs", "int64", outputs), ("out_slots", "int64", outputs)]
        return Layout([*self._token_columns(tokens), *lengths, *places, *sampling])

    def _columns(self, inputs: StepInputs, sampling: Columns) -> dict[str, Array]:
        mappings = {f"slot_mapping.{group}": inputs.slot_mappings[group] for group in self._groups}
        return {
            "token_slots": inputs.token_slots,
            "token_ids": inputs.token_ids,
            "positions": inputs.positions,
            "seq_lens": inputs.context_lens + inputs.query_lens,
            **mappings,
            **sampling,
        }

    def news(self, tables: Columns) -> Work:
        """Work that brings the block tables up to date with what `DeviceBatch.take_news` gave."""
        types = {name: "int64" if name.startswith("index") else "int32" for name in tables}
        layout = Layout([(name, types[name], len(values)) for name, values in tables.items()])
        package = self._news.pack(layout, tables)

        @torch.inference_mode()
        def work() -> None:
            package.send()
            given = package.columns()
            for group, table in enumerate(self._tables):
                table.view(-1).index_copy_(0, given[f"index.{group}"], given[f"block.{group}"])

        return work

    # ── any step, kernel by kernel ────────────────────────────────────────────────────────────────────────────

    def step(self, inputs: StepInputs, sampling: Columns, ending: Ending, out: Logits) -> Work:
        """Work that runs the step kernel by kernel. If it does not sample, it leaves that to the caller and `sample`,
        and fills `out`."""
        num_rows, num_outputs = len(inputs.slots), len(inputs.rows)
        columns = self._columns(inputs, sampling)
        columns["slots"], columns["outputs"], columns["out_slots"] = inputs.slots, inputs.outputs, inputs.out_slots
        columns["query_start"] = _starts(inputs.query_lens)
        layout = self._layout(num_rows, len(inputs.token_slots), num_outputs)
        package = self._step.pack(layout, columns)
        width = -(-inputs.longest // self._block_size)

        @torch.inference_mode()
        def work() -> None:
            package.send()
            given = package.columns()
            batch = ForwardBatch(
                token_ids=self._token_ids(given),
                positions=given["positions"],
                query_lens=inputs.query_lens,
                context_lens=inputs.context_lens,
                block_tables=[table[:, :width].index_select(0, given["slots"]) for table in self._tables],
                slot_mappings=[given[f"slot_mapping.{group}"] for group in self._groups],
                seq_lens_tensor=given["seq_lens"],
                query_start_tensor=given["query_start"],
            )
            hidden = self._run_model(batch.token_ids, batch.positions, self._prepare(batch))
            if num_outputs:
                states = hidden if num_outputs == batch.num_tokens else hidden.index_select(0, given["outputs"])
                logits = self._model.logits(states)
                if ending.mode is None:
                    out.logits = logits
                else:
                    self._finish(logits, given, given["out_slots"], ending)
            out.hidden = hidden

        return work

    def _prepare(self, batch: ForwardBatch) -> list[Any]:
        return [backend.prepare(batch, group) for group, backend in enumerate(self._backends)]

    # ── decode steps as device graphs ─────────────────────────────────────────────────────────────────────────

    def graph_work(self, key: GraphKey) -> Work:
        """What a graph holds: a decode step over what `decode` sends. Now only padding is there."""
        layout = self._decode_layout(key.rows)
        package = self._step.pack(layout, {}, self._padding)
        package.send()
        given = package.columns()
        width = -(-key.max_seq_len // self._block_size)
        if not self._graph_tables:
            self._graph_tables = [torch.full_like(table, NULL_BLOCK).view(-1) for table in self._tables]
        tables = [table[: key.rows * width].view(key.rows, width) for table in self._graph_tables]
        mappings = [given[f"slot_mapping.{group}"] for group in self._groups]
        batch = DecodeBatch(given["positions"], given["seq_lens"], tables, mappings, key.max_seq_len)
        metadata = [backend.prepare_decode(batch, group) for group, backend in enumerate(self._backends)]
        kept = self._kept_logits(key.rows) if key.ending.mode is None else None

        @torch.inference_mode()
        def work() -> None:
            for table, own in zip(self._tables, tables, strict=True):
                torch.index_select(table[:, :width], 0, given["token_slots"], out=own)
            logits = self._model.logits(self._run_model(self._token_ids(given), batch.positions, metadata))
            if kept is None:
                self._finish(logits, given, given["token_slots"], key.ending)
            else:
                kept.copy_(logits)

        return work

    def _kept_logits(self, rows: int) -> torch.Tensor:
        """[rows, vocab] float32: where graphs that do not sample leave their logits. One tensor for all, since what a
        graph returns stays taken from the memory that the others share."""
        if self._graph_logits is None:
            size = (self._max_num_seqs, self._vocab_size)
            self._graph_logits = torch.empty(size, dtype=torch.float32, device=self._device)
        return self._graph_logits[:rows]

    def decode(self, inputs: StepInputs, sampling: Columns, key: GraphKey, replay: Work, out: Logits) -> Work:
        """Work that runs a decode step by `replay` of its graph; as `step` with the ending of `key`."""
        columns = self._columns(inputs, sampling)
        package = self._step.pack(self._decode_layout(key.rows), columns, self._padding)

        @torch.inference_mode()
        def work() -> None:
            package.send()
            replay()
            if key.ending.mode is None:
                out.logits = self._kept_logits(key.rows)

        return work

    # ── tokens ────────────────────────────────────────────────────────────────────────────────────────────────

    def sample(
        self, logits: torch.Tensor, sampling: Columns, ending: Ending
    ) -> tuple[torch.Tensor, LogprobColumns | None]:
        """What a step ends with, outside a step: tokens, and their log probabilities if it reports them. What it takes
        is sent now."""
        return self._choose(logits, {n: torch.from_numpy(v).to(logits.device) for n, v in sampling.items()}, ending)

    def feed(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """These tokens were chosen elsewhere; the next steps compute them."""
        index, values = (torch.tensor(part, dtype=torch.int64) for part in (slots, token_ids))
        self._fed.index_copy_(0, index.to(self._fed.device), values.to(self._fed.device))

    def fetch(self, rows: int, ending: Ending) -> tuple[Work, Sampled]:
        """Work that copies what the step sampled to the host, and where to; it stays there while `depth` steps are
        handed over."""
        host = self._hosts[self._next_host]
        self._next_host = (self._next_host + 1) % len(self._hosts)
        return lambda: host.fetch(self._sampled, rows, ending.reports), host

    def _token_ids(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[tokens]: those the host knows, and the newest of their slots in place of the others."""
        token_ids = given["token_ids"]
        return torch.where(token_ids < 0, self._fed.index_select(0, given["token_slots"]), token_ids)

    def _run_model(self, token_ids: torch.Tensor, positions: torch.Tensor, metadata: list[Any]) -> torch.Tensor:
        return self._model.forward(token_ids, positions, ForwardContext(self._layers, metadata)).hidden

    def _choose(
        self, logits: torch.Tensor, given: Mapping[str, torch.Tensor], ending: Ending
    ) -> tuple[torch.Tensor, LogprobColumns | None]:
        """Tokens, and what is reported of them."""
        assert ending.mode is not None
        columns = SamplingColumns(*(given[name] for name in SamplingColumns._fields))
        tokens = self._kernels.sample(logits, columns, ending.mode)
        return tokens, self._kernels.logprobs(logits, tokens, given["num_logprobs"]) if ending.reports else None

    def _finish(
        self, logits: torch.Tensor, given: Mapping[str, torch.Tensor], slots: torch.Tensor, ending: Ending
    ) -> None:
        """Sample, and keep the tokens for the host and for the next step."""
        tokens, logprobs = self._choose(logits, given, ending)
        self._sampled.keep(tokens, logprobs)
        self._fed.index_copy_(0, slots, tokens.clamp_min(0))  # a row that failed feeds something: nobody hears of it


def _starts(query_lens: Array) -> Array:
    return np.concatenate((np.zeros(1, dtype=np.int64), query_lens.cumsum()))
