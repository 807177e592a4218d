"""Answers as they grow, and how they are shown: live on a terminal, in order elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Protocol, Self

from interlace.messages import RequestOutput


class Answer:
    """What has come for one prompt."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.texts: dict[int, str] = {}
        self.error: str | None = None
        self.finish_reasons: dict[int, str] = {}
        self.last: RequestOutput | None = None
        """The latest delta, for usage and metrics."""
        self.new_text = ""
        """Of the first sample, since the last delta."""

    def add(self, delta: RequestOutput) -> None:
        """Take in the next delta."""
        self.last = delta
        self.error = self.error or delta.error
        self.new_text = ""
        for output in delta.outputs:
            self.texts[output.index] = self.texts.get(output.index, "") + output.text
            if output.finish_reason is not None:
                self.finish_reasons[output.index] = output.finish_reason
            if output.index == 0:
                self.new_text = output.text

    @property
    def finished(self) -> bool:
        return self.last is not None and self.last.finished

    @property
    def text(self) -> str:
        """All samples; numbered if there are several."""
        if len(self.texts) < 2:
            return self.texts.get(0, "")
        return "\n".join(f"[{index}] {text}" for index, text in sorted(self.texts.items()))

    def row(self) -> tuple[str, ...]:
        """Cells of the closing table."""
        if self.last is None:
            return (self.title, *["-"] * 6, "not started")
        usage, metrics = self.last.usage, self.last.metrics
        finish = ", ".join(sorted(set(self.finish_reasons.values())))
        return (
            self.title,
            str(usage.prompt_tokens),
            str(usage.cached_tokens),
            str(usage.completion_tokens),
            _seconds(metrics.ttft),
            _rate(self.last),
            _seconds(metrics.e2e_latency),
            finish,
        )


class View(Protocol):
    """A way to show answers while they grow."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, answer: Answer) -> None:
        """`answer` has grown."""
        ...


class PlainView:
    """For pipes and files: one prompt is streamed as it is; several are printed whole, in order, under headings."""

    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers
        self._printed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.stdout.flush()

    def update(self, answer: Answer) -> None:
        if len(self._answers) == 1 and len(answer.texts) < 2:
            sys.stdout.write(answer.new_text + ("\n" if answer.finished else ""))
            sys.stdout.flush()
            _print_error(answer)
            return
        while self._printed < len(self._answers) and self._answers[self._printed].finished:
            done = self._answers[self._printed]
            self._printed += 1
            print(f"[{self._printed}] {done.title}\n{done.text}\n", flush=True)
            _print_error(done)


class LiveView:
    """For terminals: a panel per prompt, all growing at once; at the end the whole texts."""

    def __init__(self, answers: list[Answer]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._answers = answers
        self._console = Console()
        self._live = Live(console=self._console, get_renderable=self._render, transient=True, refresh_per_second=10)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        from rich.text import Text

        for answer in self._answers:
            if answer.texts:
                self._console.print(Text(answer.title, style="bold cyan"))
                self._console.print(Text(answer.text.strip("\n")))
                self._console.print()
            _print_error(answer)

    def update(self, answer: Answer) -> None:
        """Nothing to do: the screen is drawn ten times a second."""

    def _render(self) -> Any:
        """As many panels as the screen holds, unfinished answers first, each with the end of its text."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        room = max(1, self._console.height // 4)
        shown = sorted(self._answers, key=lambda answer: answer.finished)[:room]
        shown = [answer for answer in self._answers if answer in shown]
        lines = max(2, self._console.height // len(shown) - 3)
        width = self._console.width - 4
        panels: list[Any] = []
        for answer in shown:
            text = Text(answer.text).wrap(self._console, width)[-lines:]
            style = "green" if answer.finished else "cyan"
            head = Text(answer.title[: width - 4], style="bold")
            panels.append(Panel(Text("\n").join(text), title=head, title_align="left", border_style=style))
        if len(shown) < len(self._answers):
            panels.append(Text(f"and {len(self._answers) - len(shown)} more", style="dim"))
        return Group(*panels)


def _print_error(answer: Answer) -> None:
    if answer.error and answer.finished:
        print(f"interlace: '{answer.title}' failed: {answer.error}", file=sys.stderr)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _rate(output: RequestOutput) -> str:
    """Tokens a second after the first one."""
    first, last = output.metrics.first_token_time, output.metrics.last_token_time
    if first is None or last is None or last <= first:
        return "-"
    return f"{(output.usage.completion_tokens - 1) / (last - first):.1f}"
