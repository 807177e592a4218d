"""Runs several engines alternately on one workload and prints what each reached, and the ratios.

    python docs/benchmarks/compare.py peers.toml --rounds 3 [--json out.json]

The file names the workload (`interlace bench throughput --save-workload` makes one) and the engines, each in a Python
of its own; the first one is compared with the others:

    workload = "work.json"
    [[engine]]
    name = "interlace bf16"
    command = [".venv/bin/python", "docs/benchmarks/engines/interlace.py", "smollm2", "--weights", "bf16"]
    [[engine]]
    name = "openvino f16"
    command = ["ov/bin/python", "docs/benchmarks/engines/openvino.py", "smollm2-f16.gguf"]
    env = {}
    skip = ["prefix"]          # tasks it cannot do

All engines are loaded once; while one works, the others are stopped (SIGSTOP), so none disturbs it. In each round every
engine does every task, the order of engines turning by one each round, so that a machine that gets slower or faster
hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

Prompts = list[list[int]]


class Engine:
    """A worker process."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], skip: list[str]) -> None:
        self.name, self.skip = name, skip
        self.results: dict[str, list[float]] = {}
        self.memory_mb = 0
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},  # noqa: TID251
            start_new_session=True,  # so that it can be stopped with all its children
        )
        self.version = self._answer()["ready"]
        self.ask([[1, 2, 3, 4]], [1])
        self.results["start to first token, s"] = [time.perf_counter() - began]
        self.ask([list(range(10, 74))] * 4, [8] * 4)  # warm
        self.pause()

    def _answer(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}; its output is above")
        answer: dict[str, object] = json.loads(line)
        return answer

    def ask(self, prompts: Prompts, max_tokens: list[int], reset: bool = True) -> float:
        """Seconds for these requests."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens, "reset": reset}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if answer["tokens"] != sum(max_tokens):
            raise SystemExit(f"{self.name} gave {answer['tokens']} tokens instead of {sum(max_tokens)}")
        self.memory_mb = int(str(answer["memory_mb"]))
        return float(str(answer["seconds"]))

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        self.resume()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Work:
    """The tasks, drawn from one workload so that all engines get the same tokens."""

    def __init__(self, path: Path, requests: int) -> None:
        items = json.loads(path.read_text())
        self.items = items[:requests]
        self.pool = [token for item in items for token in item["prompt_token_ids"]]

    def cut(self, start: int, length: int) -> list[int]:
        return [self.pool[(start + i) % len(self.pool)] for i in range(length)]

    def tasks(self) -> Iterator[tuple[str, bool, Callable[[Engine, int], float]]]:
        """(name, whether more is better, measurement in the given round)."""
        prompts = [item["prompt_token_ids"] for item in self.items]
        lengths = [item["max_tokens"] for item in self.items]
        total = sum(lengths)
        batch = f"{len(prompts)} requests, output tok/s"
        yield batch, True, lambda engine, _: total / engine.ask(prompts, lengths)
        yield "single stream, tok/s", True, lambda engine, r: 128 / engine.ask([self.cut(7 + r, 64)], [128])
        yield (
            "prefill of 16 x 1,024, tok/s",
            True,
            lambda engine, r: 16384 / engine.ask([self.cut(1009 * i + 97 * r, 1024) for i in range(1, 17)], [1] * 16),
        )
        yield "TTFT of 64 tokens, ms", False, lambda engine, r: 1000 * engine.ask([self.cut(60013 + 31 * r, 64)], [1])
        yield (
            "TTFT of 1,024 tokens, ms",
            False,
            lambda engine, r: 1000 * engine.ask([self.cut(50021 + 31 * r, 1024)], [1]),
        )
        yield "prefix: 32 x 1,056 distinct, s", False, lambda engine, r: engine.ask(self._distinct(r), [16] * 32)
        yield "prefix: shared, cold, s", False, lambda engine, r: engine.ask(self._shared(r, 1), [16] * 32)
        yield "prefix: shared, warm, s", False, lambda engine, r: engine.ask(self._shared(r, 2), [16] * 32, reset=False)

    def _distinct(self, number: int) -> Prompts:
        return [self.cut(3001 + 613 * i + number, 1056) for i in range(32)]

    def _shared(self, number: int, suffixes: int) -> Prompts:
        prefix = self.cut(70001 + 5003 * number, 1024)
        return [prefix + self.cut(20011 + suffixes * 4001 + 37 * i + 9000 * number, 32) for i in range(32)]


def measure(engines: list[Engine], work: Work, rounds: int, only: str) -> list[tuple[str, bool]]:
    """Fill the engines' results; returns (task, whether more is better)."""
    tasks = [task for task in work.tasks() if only in task[0]]
    for number in range(rounds):
        for engine in engines[number % len(engines) :] + engines[: number % len(engines)]:
            engine.resume()
            for name, _, run in tasks:
                if not any(name.startswith(word) for word in engine.skip):
                    value = run(engine, number)
                    engine.results.setdefault(name, []).append(value)
                    print(f"round {number + 1}: {engine.name}: {name}: {value:.4g}", file=sys.stderr)
            engine.pause()
    return [(name, more) for name, more, _ in tasks]


def table(engines: list[Engine], tasks: list[tuple[str, bool]]) -> str:
    """Medians with (least–most), and the first engine's ratio to each other one: above 1 it is better."""
    lines = ["| work | " + " | ".join(engine.name for engine in engines) + " |", "|---" * (len(engines) + 1) + "|"]
    for name, more in [*tasks, ("start to first token, s", False)]:
        cells = []
        ours = engines[0].results.get(name)
        for engine in engines:
            values = engine.results.get(name)
            if not values:
                cells.append("–")
                continue
            median = statistics.median(values)
            cell = f"{median:.4g} ({min(values):.4g}–{max(values):.4g})"
            if engine is not engines[0] and ours:
                mine = statistics.median(ours)
                cell += f" **{mine / median if more else median / mine:.2f}x**"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| peak memory, MB | " + " | ".join(str(engine.memory_mb) for engine in engines) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("config", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64, help="how many of the workload's requests run at once (64)")
    parser.add_argument("--only", default="", help="tasks whose name contains this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = tomllib.loads(args.config.read_text())
    work = Work(Path(config["workload"]), args.requests)
    engines: list[Engine] = []
    try:
        for entry in config["engine"]:
            print(f"starting {entry['name']}", file=sys.stderr)
            engines.append(Engine(entry["name"], entry["command"], entry.get("env", {}), entry.get("skip", [])))
        tasks = measure(engines, work, args.rounds, args.only)
        print(table(engines, tasks))
        for engine in engines:
            print(f"\n{engine.name}: {engine.version}", end="")
        print()
        if args.json:
            args.json.write_text(json.dumps({engine.name: engine.results for engine in engines}, indent=1))
    finally:
        for engine in engines:
            engine.end()


if __name__ == "__main__":
    main()
