"""`interlace generate`: answer prompts, all at once, and say how fast it went."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from interlace.cli.sampling_flags import add_sampling_flags, sampling_params

if TYPE_CHECKING:
    from interlace.cli.answers import Answer
    from interlace.config import LoadedSettings
    from interlace.engine.llm import LLM

NUMBERS_WIDTH = 66
"""Columns of the closing table beside the prompt."""


def add_parser(subparsers: Any) -> None:
    """Declare `generate`."""
    parser = subparsers.add_parser("generate", help="answer prompts and print the results", description=__doc__)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="prompts, one a line; .jsonl: one JSON prompt a line; .json: an array; - reads stdin",
    )
    parser.add_argument("--chat", action="store_true", help="put text prompts through the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message for --chat")
    parser.add_argument("--json", action="store_true", help="print an array with one RequestOutput object per prompt")
    parser.add_argument("--timeout", type=float, metavar="S", help="end each request after so many seconds")
    add_sampling_flags(parser, max_tokens=128, temperature=0.0)
    parser.add_argument("--n", type=int, default=1, metavar="N", help="answers per prompt (1)")
    parser.add_argument("--logprobs", type=int, metavar="N", help="report the N most likely tokens at each position")
    parser.add_argument("--prompt-logprobs", type=int, metavar="N", help="the same for the prompt")


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Answer the prompts; 1 if any of them failed."""
    from interlace.cli.prompts import as_chat, read_prompts
    from interlace.cli.startup import print_startup
    from interlace.engine.llm import LLM

    prompts = args.prompt + (read_prompts(args.prompts_file) if args.prompts_file else [])
    if not prompts:
        from interlace.cli.parser import UsageError

        raise UsageError("there is nothing to answer: give --prompt TEXT (may be repeated) or --prompts-file FILE")
    if args.chat:
        prompts = [as_chat(prompt, args.system) for prompt in prompts]
    params = sampling_params(args, n=args.n, logprobs=args.logprobs, prompt_logprobs=args.prompt_logprobs)
    with LLM.from_loaded(loaded) as llm:
        print_startup(llm.front)
        if args.json:
            return _print_json(llm, prompts, params, args.timeout)
        answers = _print_answers(llm, prompts, params, args.timeout)
        print_closing_table(answers)
        return int(any(answer.error for answer in answers))


def _print_json(llm: LLM, prompts: list[Any], params: Any, timeout: float | None) -> int:
    import msgspec

    outputs = llm.generate(prompts, params, timeout=timeout)
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(outputs), indent=2).decode() + "\n")
    return int(any(output.error for output in outputs))


def _print_answers(llm: LLM, prompts: list[Any], params: Any, timeout: float | None) -> list[Answer]:
    from interlace.cli.answers import Answer, LiveView, PlainView
    from interlace.cli.prompts import title

    answers = [Answer(title(prompt)) for prompt in prompts]
    view = LiveView(answers) if sys.stdout.isatty() else PlainView(answers)
    with view:
        for i, delta in llm.stream(prompts, params, timeout=timeout):
            answers[i].add(delta)
            view.update(answers[i])
    return answers


def print_closing_table(answers: list[Answer]) -> None:
    """Times, rates and prefix-cache hits, on stderr."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True)
    table = Table(box=SIMPLE_HEAD, header_style="bold")
    for name in ("prompt", "in", "cached", "out", "TTFT", "tokens/s", "time", "finish"):
        table.add_column(name, justify="left" if name in ("prompt", "finish") else "right", no_wrap=True)
    room = max(12, console.width - NUMBERS_WIDTH)
    for answer in answers:
        title, *numbers = answer.row()
        short = title if len(title) <= room else f"{title[: room - 1]}…"
        table.add_row(Text(short), *numbers)
    console.print(table)
    console.print(summary(answers), highlight=False, soft_wrap=True)


def summary(answers: list[Answer]) -> str:
    """The whole run in a line."""
    last = [answer.last for answer in answers if answer.last is not None]
    tokens = sum(output.usage.completion_tokens for output in last)
    asked = sum(output.usage.prompt_tokens for output in last)
    cached = sum(output.usage.cached_tokens for output in last)
    begin = min((output.metrics.arrival_time for output in last), default=0.0)
    end = max((output.metrics.finished_time or begin for output in last), default=0.0)
    rate = f"{tokens / (end - begin):,.1f}" if end > begin else "-"
    share = f"{cached / asked:.0%}" if asked else "-"
    return (
        f"{len(last)} prompts, {tokens} tokens in {end - begin:.2f} s: {rate} tokens/s; "
        f"prefix-cache hits: {cached} of {asked} prompt tokens ({share})"
    )
