"""`interlace serve`: an OpenAI-compatible HTTP server. Its settings are those under `server`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace.config import LoadedSettings


def add_parser(subparsers: Any) -> None:
    """Declare `serve`."""
    subparsers.add_parser("serve", help="serve a model over HTTP, OpenAI-compatible", description=__doc__)


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Serve until SIGTERM or SIGINT (Ctrl-C)."""
    from interlace.server.serve import serve

    return serve(loaded)
