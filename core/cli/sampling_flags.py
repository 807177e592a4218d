"""Sampling parameters as flags of `generate` and `chat`."""

from __future__ import annotations

import argparse
from typing import Any

from interlace.sampling.params import SamplingParams

# Flag → (type, help). The parameter has the name of the flag; `--seed` is a setting and therefore not here.
_NUMBERS: dict[str, tuple[type, str]] = {
    "max-tokens": (int, "longest answer in tokens"),
    "min-tokens": (int, "no end of the answer before so many tokens"),
    "temperature": (float, "0 takes the most likely token; higher is more varied"),
    "top-p": (float, "sample from the most likely tokens that make up this probability"),
    "top-k": (int, "sample from so many of the most likely tokens"),
    "min-p": (float, "leave out tokens less likely than this share of the most likely one"),
    "presence-penalty": (float, "lower the odds of tokens that have occurred"),
    "frequency-penalty": (float, "lower the odds of tokens by how often they have occurred"),
    "repetition-penalty": (float, "divide the odds of tokens that have occurred, in prompt or answer"),
}


def add_sampling_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Declare the flags; `defaults` (by parameter name) differ from those of `SamplingParams` for this command."""
    for name, (kind, text) in _NUMBERS.items():
        key = name.replace("-", "_")
        default = defaults.get(key, getattr(SamplingParams(), key))
        shown = "up to max_model_len" if default is None else default
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=name[0].upper(), help=f"{text} ({shown})")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer at this text")
    parser.add_argument(
        "--stop-token-id", action="append", type=int, default=[], metavar="ID", help="end at this token"
    )
    parser.add_argument("--bad-word", action="append", default=[], metavar="TEXT", help="never write this")
    parser.add_argument("--ignore-eos", action="store_true", help="go on beyond the end-of-sequence token")


def sampling_params(args: argparse.Namespace, **more: Any) -> SamplingParams:
    """The parameters that the flags ask for. Raises `InvalidRequestError` naming the parameter."""
    numbers = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _NUMBERS}
    return SamplingParams(
        **numbers,
        stop=args.stop,
        stop_token_ids=args.stop_token_id,
        bad_words=args.bad_word,
        ignore_eos=args.ignore_eos,
        **more,
    )
