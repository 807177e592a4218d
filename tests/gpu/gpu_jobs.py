"""What a job of run.py returns, and how one runs: in a process of its own, so that whatever it does to the GPU, to the
memory, or to itself, the others still run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Table:
    """Rows of figures; numbers are rounded when they are shown, not in the JSON."""

    title: str
    columns: list[str]
    rows: list[list[Any]] = dataclasses.field(default_factory=list)

    def add(self, *cells: Any) -> None:
        self.rows.append(list(cells))


@dataclasses.dataclass
class Outcome:
    """What a job found. It is correct if there are no `failures`."""

    num_checks: int = 0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    """What went wrong, by the name of the check."""
    tables: list[Table] = dataclasses.field(default_factory=list)
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    """For the jobs that come after this one."""

    def check(self, name: str, error: str | None) -> None:
        """Count a check; `error` says why it failed."""
        self.num_checks += 1
        if error is not None:
            self.failures[name] = error


@dataclasses.dataclass(frozen=True)
class Job:
    """`target` is "module:function"; it is called with `arguments` and returns an `Outcome`."""

    name: str
    target: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout_s: float = 150.0
    measures: bool = False
    """Runs alone; and is told `values` of earlier jobs."""


@dataclasses.dataclass
class Report:
    """How a job went."""

    name: str
    seconds: float
    outcome: Outcome
    error: str = ""
    """Empty unless it did not come to its end: one line."""
    traceback: str = ""

    @property
    def is_good(self) -> bool:
        return not self.error and not self.outcome.failures


def run_job(job: Job, values: Mapping[str, float], environment: Mapping[str, str], timeout_s: float) -> Report:
    """Run a job in a child process, at most for `timeout_s`; then it and its children are killed."""
    began = time.monotonic()
    if timeout_s <= 1:
        return Report(job.name, 0.0, Outcome(), "not run: the time for everything is used up (--minutes)")
    arguments = {**job.arguments, **({"values": dict(values)} if job.measures else {})}
    with tempfile.TemporaryDirectory(prefix="interlace-gpu-") as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log")
        command = [sys.executable, str(Path(__file__)), job.target, json.dumps(arguments), str(answer)]
        with log.open("wb") as sink:
            own = {**environment, "TMPDIR": folder}  # what it leaves there goes with the folder
            child = subprocess.Popen(command, stdout=sink, stderr=sink, env=own, start_new_session=True)
            limit = min(timeout_s, job.timeout_s)
            try:
                code = child.wait(limit)
                error = f"ended with code {code}" if code else ""
            except subprocess.TimeoutExpired:
                error = f"not done after {limit:.0f} s"
            finally:
                _kill(child)
        tail = log.read_text(errors="replace")[-6000:]
        seconds = time.monotonic() - began
        if error or not answer.exists():
            last = tail.strip().rpartition("\n")[2]
            return Report(job.name, seconds, Outcome(), f"{error or 'gave no answer'}; {last}"[:300], tail)
        found = json.loads(answer.read_text())
        outcome = Outcome(**{**found["outcome"], "tables": [Table(**table) for table in found["outcome"]["tables"]]})
        return Report(job.name, seconds, outcome, found["error"], found["traceback"])


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The job's process group, which is its own: also what it started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


_WIDEST = 90


def format_table(table: Table) -> str:
    """As text; numbers stand to the right, words to the left."""
    words = [bool(table.rows) and isinstance(cell, str) for cell in (table.rows or [table.columns])[0]]
    cells = [table.columns, *([_text(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        placed = zip(row, widths, words, strict=True)
        lines.append("  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in placed))
    return "\n".join([table.title, *(f"  {line}".rstrip() for line in lines)])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    text = "-" if value is None else str(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def main(arguments: Sequence[str]) -> int:
    """The child: run one job and write what became of it."""
    target, given, path = arguments
    module, _, function = target.partition(":")
    answer: dict[str, Any] = {"outcome": Outcome(), "error": "", "traceback": ""}
    try:
        answer["outcome"] = getattr(importlib.import_module(module), function)(**json.loads(given))
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
        answer["traceback"] = traceback.format_exc()
    answer["outcome"] = dataclasses.asdict(answer["outcome"])
    Path(path).write_text(json.dumps(answer))
    sys.stdout.flush()
    # What a broken device does to destructors must not count: the answer is written.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
