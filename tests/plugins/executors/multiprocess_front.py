"""A front of its own, to be killed: `multiprocess_front.py FOLDER PHASE`. It says `ready` when it is in the phase."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from interlace.assemble import make_client
from interlace.clock import MonotonicClock
from interlace.messages import EngineRequest, SamplingParams
from interlace.testing import ExecutorConformance, faults


class Suite(ExecutorConformance):
    """For its means."""

    executor = "multiprocess"
    options = {"tensor_parallel": 2}  # noqa: RUF012


def main(folder: str, phase: str) -> None:
    spec = Suite().spec(Path(folder), logits_processors=(faults.stuck(),))
    if phase == "loading":
        spec = msgspec.structs.replace(spec, checkpoint=faults.stuck_loading())
    client = make_client(spec, "subprocess", MonotonicClock())

    def nothing(*arguments: Any) -> None:
        pass

    if phase == "loading":
        print("ready", flush=True)  # as far as this process can say
    client.start(nothing, nothing)
    if phase == "step":
        params = SamplingParams(max_tokens=5, logits_processors={faults.stuck().name: {}})
        client.add([EngineRequest(id="a", prompt_token_ids=[1, 2], params=params, arrival_time=0.0, seed=0)])
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
