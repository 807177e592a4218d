"""`interlace serve`: an OpenAI-compatible HTTP server. Any setting of the engine may be given, too, such as --model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace.config import LoadedSettings


def add_parser(subparsers: Any) -> None:
    """Declare `serve`."""
    parser = subparsers.add_parser("serve", help="serve a model over HTTP, OpenAI-compatible", description=__doc__)
    parser.section = "server"


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Serve until SIGTERM or SIGINT (Ctrl-C)."""
    from interlace.server.serve import serve

    return serve(loaded)
