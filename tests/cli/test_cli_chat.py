"""`interlace chat`: piped, and on a pseudo-terminal with real keys."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys
from interlace.cli import main
from interlace.engine.front import Front
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import byte_tokenizer, fake_assembly, front_spec

tokenizer = byte_tokenizer()

def answer(request):
    prompt = tokenizer.decode(request.prompt_token_ids)
    if "slow" in prompt.splitlines()[-2]:
        return tokenizer.encode("again and ") * 500
    if "fail" in prompt.splitlines()[-2]:
        raise RuntimeError("the engine broke")
    return [*tokenizer.encode(f"I heard {len(prompt.splitlines()) - 1} lines: " + prompt.splitlines()[-2]), 256]

def open_fake(loaded, **options):
    client = ScriptedClient(answer, pause=0.002)
    return Front(fake_assembly(client, tokenizer=tokenizer, spec=front_spec(257, max_model_len=6000)))

Front.open = open_fake
sys.exit(main(["chat", *sys.argv[1:]]))
"""


class Terminal:
    """A program on a pseudo-terminal, and what it has written."""

    def __init__(self, *arguments):
        self.primary, secondary = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env={**os.environ, "TERM": "xterm", "INPUTRC": os.devnull},
        )
        os.close(secondary)
        self.seen = ""

    def type(self, text):
        os.write(self.primary, text.encode())

    def read_until(self, expected, seconds=20.0):
        """Wait for `expected` in what came since the last call; returns all up to there."""
        deadline = time.monotonic() + seconds
        while expected not in self.seen:
            ready, _, _ = select.select([self.primary], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{expected!r} did not come; the terminal shows {self.seen!r}"
            try:
                data = os.read(self.primary, 4096)
            except OSError:
                data = b""
            assert data, f"the program ended without {expected!r}; the terminal shows {self.seen!r}"
            self.seen += data.decode(errors="replace")
        before, _, self.seen = self.seen.partition(expected)
        return before

    def press_until(self, key, expected):
        """Press `key` until `expected` comes: readline notices a signal that arrives while it sets up its prompt only
        with the next key."""
        for _ in range(20):
            self.type(key)
            try:
                return self.read_until(expected, seconds=1.0)
            except AssertionError:
                continue
        return self.read_until(expected)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.primary)


def _take_terminal():
    """In the child: make the pseudo-terminal the controlling one, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_conversation_on_a_terminal(terminal):
    terminal.read_until("Talking to fake")
    terminal.read_until("> ")
    terminal.type("hello\n")
    terminal.read_until("I heard 1 lines: <user>hello")
    terminal.read_until("tokens, first after")
    terminal.read_until("> ")
    terminal.type("and more\n")
    terminal.read_until("I heard 3 lines: <user>and more")  # the history has the first question and its answer
    terminal.read_until("> ")
    terminal.type("/reset\n")
    terminal.read_until("forgotten")
    terminal.read_until("> ")
    terminal.type("anew\n")
    terminal.read_until("I heard 1 lines: <user>anew")
    terminal.read_until("> ")
    terminal.type("/hepl\n")
    terminal.read_until("Did you mean '/help'?")
    terminal.read_until("> ")
    terminal.type("/help\n")
    terminal.read_until("/quit")
    terminal.read_until("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(20) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    terminal.read_until("> ")
    terminal.type("be slow\n")
    terminal.read_until("again and again and")
    terminal.type("\x03")
    terminal.read_until("(stopped)")
    terminal.read_until("> ")
    terminal.type("quick now\n")
    terminal.read_until("I heard 3 lines: <user>quick now")  # what was said before the stop is remembered
    terminal.read_until("> ")
    terminal.press_until("\x03", "Ctrl-D leaves")  # at the prompt it only clears the line
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


def piped(text, *arguments):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], input=text, capture_output=True, text=True, timeout=60
    )


def test_piped_input_gives_answers_and_nothing_else_on_stdout():
    done = piped("hello\n\nbye\n", "--system", "Be brief")
    assert done.returncode == 0
    assert done.stdout == "I heard 2 lines: <user>hello\nI heard 4 lines: <user>bye\n"
    assert done.stderr == ""


def test_a_message_too_long_is_refused_and_the_conversation_goes_on():
    done = piped("x" * 7000 + "\nhello\n")
    assert done.stdout == "I heard 1 lines: <user>hello\n"
    assert "the prompt has 7012 tokens" in done.stderr and "/reset forgets the conversation" in done.stderr


def test_a_broken_engine_ends_the_program_with_an_error():
    done = piped("please fail\n")
    assert done.returncode != 0 and "the engine broke" in done.stderr
