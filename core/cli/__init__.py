"""The `interlace` command. Each subcommand is a file of this package, imported only when it is used.

A command module has `add_parser(subparsers)`, which declares its own arguments, and `run(args, loaded) -> int`, which
is given those and the `LoadedSettings`. Every command takes every setting as a flag by its dotted path, so a command
declares none of them itself. Exit codes: 0, 1 (a command's own failure), 2 (an `InterlaceError`), 130 (Ctrl-C).
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from interlace import __version__
from interlace.cli.parser import EPILOG, Parser, UsageError
from interlace.errors import InterlaceError, did_you_mean

COMMANDS = {
    "generate": "answer prompts and print the results",
    "chat": "talk to a model",
    "serve": "serve a model over HTTP, OpenAI-compatible",
    "batch": "answer a file of requests, resumably",
    "bench": "measure an engine, its parts, or a server",
    "models": "list the models that are installed",
    "plugins": "list, show, check and create plugins",
    "config": "show, explain and check the configuration",
}
"""Command → one line of help; the module has the same name."""

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; user errors are one message on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except InterlaceError as error:
        if _debug(arguments):
            traceback.print_exc()
        print(f"interlace: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left (`interlace config | head`); a second complaint at exit is silenced, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    command = next((word for word in arguments if word in COMMANDS), None)
    parser = _parser(command)
    if command is None:
        return _without_command(parser, arguments)
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.print_help_of(arguments)
        return 0
    # Settings are read here and not above: help and --version answer without them.
    from interlace.cli.flags import split_settings
    from interlace.config import load_settings

    rest, settings, config_file = split_settings(arguments)
    args = parser.parse(rest)
    _log_to_stderr()
    return int(importlib.import_module(f"interlace.cli.{command}").run(args, load_settings({}, settings, config_file)))


def _parser(command: str | None) -> Parser:
    """The parser with one command spelled out; the others are named only, so that their modules stay unimported."""
    parser = Parser(prog="interlace", description="An LLM inference engine assembled from plugins.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"interlace {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        if name == command:
            importlib.import_module(f"interlace.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _without_command(parser: Parser, arguments: list[str]) -> int:
    word = next((word for word in arguments if not word.startswith("-")), None)
    if word is not None:
        raise UsageError(f"unknown command '{word}'.{did_you_mean(word, COMMANDS)} Commands: {', '.join(COMMANDS)}")
    if "--version" in arguments:
        print(f"interlace {__version__}")
        return 0
    unknown = next((word for word in arguments if word not in ("-h", "--help", "--debug")), None)
    if unknown is not None:
        raise UsageError(f"a command is missing before '{unknown}'. Commands: {', '.join(COMMANDS)}")
    parser.print_help()
    return 0


def _debug(arguments: list[str]) -> bool:
    from interlace.config import debug_requested, environment

    return "--debug" in arguments or debug_requested(environment())


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="interlace: %(levelname)s: %(message)s", stream=sys.stderr)
