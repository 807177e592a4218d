"""`interlace chat`: talk to a model. Ctrl-C stops the answer, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from interlace.cli.sampling_flags import add_sampling_flags, sampling_params

if TYPE_CHECKING:
    from interlace.config import LoadedSettings
    from interlace.engine.llm import LLM
    from interlace.messages import RequestOutput, SamplingParams

COMMANDS = {"/help": "show this", "/reset": "forget the conversation", "/quit": "leave (also Ctrl-D)"}


def add_parser(subparsers: Any) -> None:
    """Declare `chat`."""
    parser = subparsers.add_parser("chat", help="talk to a model", description=__doc__)
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    add_sampling_flags(parser, max_tokens=None, temperature=0.7)


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Talk until the user leaves."""
    from interlace.cli.startup import print_startup
    from interlace.engine.llm import LLM

    params = sampling_params(args)
    with LLM.from_loaded(loaded) as llm:
        print_startup(llm.front)
        Conversation(llm, params, args.system).run()
    return 0


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._first)
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Read, answer, repeat, until the input ends or the user leaves."""
        if self._terminal:
            import readline  # noqa: F401  gives input() line editing and history

            self._say(f"Talking to {self._llm.front.spec.model}. /help shows the commands, Ctrl-C stops an answer.")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line:
                self._turn(line)

    def _read(self) -> str | None:
        """The next line; None at the end of the input."""
        while True:
            try:
                return input("> " if self._terminal else "").strip()
            except EOFError:
                if self._terminal:
                    print()
                return None
            except KeyboardInterrupt:
                print()
                self._say("(/quit or Ctrl-D leaves)")

    def _command(self, line: str) -> bool:
        """Carry out a slash command; False: leave."""
        from interlace.errors import did_you_mean

        if line in ("/quit", "/exit"):
            return False
        if line == "/reset":
            self.messages = list(self._first)
            self._say("The conversation is forgotten.")
        elif line == "/help":
            self._say("\n".join(f"{name:8} {text}" for name, text in COMMANDS.items()))
        else:
            self._say(f"There is no command '{line}'.{did_you_mean(line, COMMANDS)} /help shows all.")
        return True

    def _turn(self, line: str) -> None:
        """One question and its answer. A stopped answer stays in the conversation as far as it got."""
        from interlace.errors import InvalidRequestError

        messages = [*self.messages, {"role": "user", "content": line}]
        parts: list[str] = []
        last: RequestOutput | None = None
        try:
            for _, delta in self._llm.stream([messages], self._params):
                last = delta
                parts.append(delta.outputs[0].text)
                sys.stdout.write(parts[-1])
                sys.stdout.flush()
            print()
        except KeyboardInterrupt:
            print()
            self._say("(stopped)")
        except InvalidRequestError as error:
            self._say(f"{str(error).removeprefix('prompt 0: ')}. /reset forgets the conversation.")
            return
        if last is not None and last.error:
            self._say(f"The request failed: {last.error}")
            return
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]
        if last is not None:
            self._close(last)

    def _close(self, last: RequestOutput) -> None:
        """A line about the answer."""
        if not self._terminal:
            return
        metrics, usage = last.metrics, last.usage
        notes = [f"{usage.completion_tokens} tokens", f"{usage.cached_tokens} of {usage.prompt_tokens} cached"]
        if metrics.ttft is not None:
            notes.insert(1, f"first after {metrics.ttft * 1e3:.0f} ms")
        if last.outputs[0].finish_reason == "length":
            notes.append("cut off: max_tokens or max_model_len is reached")
        self._say(f"({', '.join(notes)})")

    def _say(self, text: str) -> None:
        """A word of the program, not of the model: on stderr, dim on a terminal."""
        print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
