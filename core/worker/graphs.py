"""`DecodeGraphs`: decode steps as device graphs, captured when they are first needed.

A graph is made for a number of rows, for sequences up to some length, and for a way of sampling. Steps are padded to
the next number of rows; the lengths are few, each four times the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from interlace.sampling.device import SamplingMode
from interlace.worker.streams import Stream, Work

logger = logging.getLogger("interlace.worker")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Numbers of rows to capture for where the settings name none: padding costs little, and so do that many graphs."""
SHORTEST_BOUND = 2048
BOUND_FACTOR = 4


class Ending(NamedTuple):
    """What a step does with its logits."""

    mode: SamplingMode | None
    """How it samples; None: it ends with the logits."""
    reports: bool = False
    """Whether it reports log probabilities, too."""

    def __str__(self) -> str:
        if self.mode is None:
            return "logits only"
        return f"sampling {self.mode.name.lower()}{', log probabilities' if self.reports else ''}"


class GraphKey(NamedTuple):
    """What a graph is made for."""

    rows: int
    max_seq_len: int
    ending: Ending


class DecodeGraphs:
    """Finds or captures the graph of a step. If one cannot be captured, the steps run without graphs from then on."""

    def __init__(
        self,
        stream: Stream,
        sizes: Sequence[int],
        max_rows: int,
        max_model_len: int,
        make_work: Callable[[GraphKey], Work],
        now: Callable[[], float],
    ) -> None:
        """`sizes`: numbers of rows, those above `max_rows` being left out; empty: `SIZES`. `make_work` makes what a
        graph of some key is to hold, in a state in which running it does no harm."""
        self.sizes = choose_sizes(sizes, max_rows)
        self.seconds = 0.0
        """Spent on capturing, in all."""
        self._stream = stream
        self._max_model_len = max_model_len
        self._make_work = make_work
        self._now = now
        self._graphs: dict[GraphKey, Work] = {}
        self.refusal: str | None = None
        """Why a graph could not be captured, as text."""

    def __len__(self) -> int:
        return len(self._graphs)

    def key(self, rows: int, longest: int, ending: Ending) -> GraphKey | None:
        """The graph for a decode step of so many rows, `longest` being its longest sequence; None: there is none."""
        size = next((size for size in self.sizes if size >= rows), None)
        if size is None or self.refusal is not None:
            return None
        bound = SHORTEST_BOUND
        while bound < longest:
            bound *= BOUND_FACTOR
        return GraphKey(size, min(bound, self._max_model_len), ending)

    def find(self, key: GraphKey) -> Work | None:
        """What runs the step; captured now if it was not before. None if that failed, now or earlier."""
        if key not in self._graphs and self.refusal is None:
            self._capture(key)
        return self._graphs.get(key)

    def _capture(self, key: GraphKey) -> None:
        began = self._now()
        self._stream.synchronize()
        try:
            self._graphs[key] = self._stream.capture(self._make_work(key))
        except Exception as error:
            self.refusal = f"{type(error).__name__}: {error}"
            self._graphs.clear()
            logger.warning("decode steps run without device graphs, since one cannot be captured: %s", self.refusal)
            return
        seconds = self._now() - began
        self.seconds += seconds
        logger.info(
            "captured the decode graph for %d rows up to %d tokens (%s) in %.2f s; %d graphs so far, %.2f s",
            key.rows,
            key.max_seq_len,
            key.ending,
            seconds,
            len(self._graphs),
            self.seconds,
        )


def choose_sizes(sizes: Sequence[int], max_rows: int) -> tuple[int, ...]:
    """The numbers of rows to capture for, ascending: those asked for, or `SIZES`, up to `max_rows`; of the default ones
    the first that reaches `max_rows` becomes `max_rows`, so that the fullest step has a graph."""
    if sizes:
        return tuple(sorted({size for size in sizes if size <= max_rows}))
    fitting = [size for size in SIZES if size < max_rows]
    return (*fitting, *([max_rows] if max_rows <= SIZES[-1] else []))
