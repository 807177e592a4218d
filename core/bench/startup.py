"""From the start of a process to the first token, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

import msgspec

from interlace.config import Settings
from interlace.errors import InterlaceError


class StartRun(msgspec.Struct, frozen=True, kw_only=True):
    """One process, seen from outside and by itself; seconds."""

    first_token: float
    """From the start of the process to its first token."""
    cpu: float
    """Processor time it took for that, all threads."""
    parts: dict[str, float]
    """What the engine says of its own start."""


class StartReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `interlace bench startup`: medians of several processes."""

    runs: list[StartRun]

    @property
    def first_token(self) -> float:
        return statistics.median(run.first_token for run in self.runs)

    @property
    def cpu(self) -> float:
        return statistics.median(run.cpu for run in self.runs)

    @property
    def parts(self) -> dict[str, float]:
        names = self.runs[0].parts
        return {name: statistics.median(run.parts[name] for run in self.runs) for name in names}


_CHILD = """
import json, sys, time
from interlace import LLM, SamplingParams
from interlace.bench.machine import process_age
from interlace.config import load_settings
llm = LLM.from_loaded(load_settings(json.loads(sys.argv[1])))
llm.generate("Hello", SamplingParams(max_tokens=1, temperature=0), progress=False)
print(json.dumps({"first_token": process_age(), "cpu": time.process_time(), "parts": llm.front.timings}), flush=True)
llm.close()
"""


def measure_start(settings: Settings, repeat: int) -> StartReport:
    """Start `repeat` processes one after the other, and one before that is not counted: it may have to read files from
    the disk. Raises `InterlaceError` if one fails."""
    # Keys of the server are no business of a process that serves nobody.
    command = [sys.executable, "-c", _CHILD, settings.model_dump_json(exclude={"server"})]
    runs = []
    for _ in range(repeat + 1):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InterlaceError(f"a started process failed:\n{done.stderr.strip()}")
        runs.append(msgspec.json.decode(done.stdout.splitlines()[-1], type=StartRun))
    return StartReport(runs=runs[1:])
