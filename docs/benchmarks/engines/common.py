"""What every engine's worker shares: requests as JSON lines on stdin, answers on stdout, everything else on stderr.

    {"prompts": [[1, 2, 3], …], "max_tokens": [9, …], "reset": true}  →  {"seconds": 1.5, "tokens": 9}

Generation is greedy, end-of-sequence tokens do not end a request, and each gives exactly the tokens asked for; the
clock runs from handing in all requests to the last token. `reset` empties the prefix cache first, outside the clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], list[int]], int]
"""(prompts, tokens to generate of each) → tokens generated."""


def peak_memory_mb() -> int:
    """Peak resident memory of this process and its descendants, in MB; shared pages count in each."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    children.setdefault(int(file.read().rsplit(")", 1)[1].split()[1]), []).append(int(name))
            except OSError:
                continue
    total, left = 0, [os.getpid()]
    while left:
        process = left.pop()
        left += children.get(process, [])
        try:
            with open(f"/proc/{process}/status") as file:
                total += next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)
        except OSError:
            continue
    return total // 1024


def serve(describe: str, generate: Generate, reset: Callable[[], object]) -> None:
    """Answer requests until stdin ends. Call it when the engine is loaded; imports are part of the start-up time."""
    answers = os.fdopen(_ANSWERS, "w")

    def answer(content: dict[str, object]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer({"ready": describe})
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("reset"):
            reset()
        began = time.perf_counter()
        tokens = generate(request["prompts"], request["max_tokens"])
        answer({"seconds": time.perf_counter() - began, "tokens": tokens, "memory_mb": peak_memory_mb()})


# Libraries print to stdout; it is set aside for the answers before any of them is imported.
_ANSWERS = os.dup(1)
os.dup2(2, 1)
