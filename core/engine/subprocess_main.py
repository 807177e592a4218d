"""The child process of `SubprocessClient`: `python -m interlace.engine.subprocess_main SOCKET_DIR`.

The first message on the command socket is the `ResolvedSpec`; nothing else of the configuration is read here. The
child ends with its parent: it holds the read end of a pipe whose write end only the parent has.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

import msgspec
import zmq

from interlace.assemble import build_core, start_executor
from interlace.clock import MonotonicClock
from interlace.engine.loop import EngineLoop, Stop
from interlace.engine.wire import Died, Event, Output, Ready, RemoteError, Reply, decode_command, encode
from interlace.interfaces.executor import Executor
from interlace.spec import ResolvedSpec


def main(socket_dir: str) -> int:
    """Serve one engine until told to stop, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    speaking = zmq.Context()  # of its own, so that it can end while the receiver sits in a read
    commands, outputs = zmq.Context().socket(zmq.PULL), speaking.socket(zmq.PUSH)
    for socket, name in ((commands, "commands"), (outputs, "outputs")):
        socket.set_hwm(0)
        socket.connect(f"ipc://{socket_dir}/{name}")

    def send(message: Any) -> None:
        outputs.send(encode(message))

    executor: Executor | None = None
    code = 0
    try:
        setup = msgspec.msgpack.decode(commands.recv(), type=tuple[ResolvedSpec, int])
        logging.basicConfig(level=setup[1], format="%(levelname)s %(name)s (engine): %(message)s")
        spec = setup[0]
        executor, info = start_executor(spec, lambda event: send(Event(event)))
        clock = MonotonicClock()
        loop = EngineLoop(
            build_core(spec, info, clock),
            executor,
            clock,
            lambda output: send(Output(output)),
            lambda call_id, value, error: send(Reply(call_id, value, RemoteError.of(error) if error else None)),
        )
        send(Ready(info))
        threading.Thread(target=_receive, args=(commands, loop), daemon=True).start()
        loop.run()
    except BaseException as error:
        send(Died(RemoteError.of(error)))
        code = 1
    finally:
        if executor is not None:
            executor.shutdown()
        outputs.close(linger=2000)
        speaking.term()  # waits until the last word, perhaps the reason of the end, is sent
    return code


def _receive(commands: zmq.Socket[bytes], loop: EngineLoop) -> None:
    while True:
        command = decode_command(commands.recv())
        loop.post(command)
        if isinstance(command, Stop):
            return


def _die_with_parent() -> None:
    """Block until the parent's end of stdin closes, which happens even when it is killed."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the receiver thread may sit in a blocking read
