"""An argument parser with errors of our kind: one message, the nearest match, no usage dump."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any, NoReturn

from interlace.errors import InterlaceError, nearest

EPILOG = (
    "Every setting is a flag of every command, by its dotted path: --model smollm2, --scheduler.use priority, "
    "--scheduler.options.priority.aging_s 30. `interlace config` lists them with their values and sources, "
    "`interlace config explain KEY` tells what one means."
)


class UsageError(InterlaceError):
    """The command line is wrong."""


class Parser(argparse.ArgumentParser):
    """Never abbreviates flags; every parser knows the flags that all commands share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.flags: list[str] = []
        self.section: str | None = None
        """The table of settings that the help text lists, for a command whose flags they are."""
        kwargs.setdefault("epilog", EPILOG)
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)
        # Taken off the command line before parsing (`split_settings`); declared here for the help text.
        self.add_argument("--config", metavar="FILE", help="settings file, TOML or YAML by its suffix")
        self.add_argument("--debug", action="store_true", help="print a full traceback when something fails")

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """As argparse; remembers the flag for suggestions."""
        self.flags.extend(arg for arg in args if isinstance(arg, str) and arg.startswith("--"))
        return super().add_argument(*args, **kwargs)

    def format_help(self) -> str:
        """As argparse, and the settings of `section`."""
        text = super().format_help()
        return text if self.section is None else f"{text}\n{_settings_help(self.section)}"

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parse; raises `UsageError` on anything unknown, with the nearest flag."""
        chain = self._chain(arguments)
        flags = ["--help", *(flag for parser in chain for flag in parser.flags)]
        for word in arguments[: arguments.index("--")] if "--" in arguments else arguments:
            # Judged before argparse, which would take the value of an unknown flag for a command.
            if word.startswith("--") and word.partition("=")[0] not in flags:
                raise _unknown_flag(word.partition("=")[0], flags, chain[-1].prog)
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            hint = "" if unknown[0].startswith("-") else f" If that is the model: --model {unknown[0]}."
            raise UsageError(f"unexpected argument '{unknown[0]}'.{hint} See {chain[-1].prog} --help")
        return args

    def print_help_of(self, arguments: list[str]) -> None:
        """Print the help of the innermost command named in `arguments`."""
        self._chain(arguments)[-1].print_help()

    def _chain(self, arguments: list[str]) -> list[Parser]:
        """This parser and those of the commands named in `arguments`, outermost first."""
        chain = [self]
        for word in arguments:
            inner = chain[-1]._subparsers_by_name().get(word)
            if inner is not None:
                chain.append(inner)
        return chain

    def _subparsers_by_name(self) -> dict[str, Parser]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}


def _unknown_flag(name: str, flags: list[str], prog: str) -> UsageError:
    from interlace.config import all_settings

    settings = [f"--{setting.key}" for setting in all_settings()]
    last_part = name.removeprefix("--").replace("-", "_")
    found = next((flag for flag in settings if flag.endswith(f".{last_part}")), None) or nearest(name, flags + settings)
    hint = f" Did you mean '{found}'?" if found else ""
    return UsageError(f"unknown flag '{name}'.{hint} See {prog} --help")


def _settings_help(section: str) -> str:
    """The flags of one table of settings, with their defaults."""
    from interlace.config import all_settings

    width = min(100, shutil.get_terminal_size().columns)
    lines = [f"settings under `{section}`, with their defaults:"]
    for setting in all_settings():
        if setting.key.startswith(f"{section}."):
            lines.append(f"  --{setting.key} {setting.default}".rstrip())
            lines += textwrap.wrap(setting.description, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"
