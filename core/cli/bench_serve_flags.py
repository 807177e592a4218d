"""The flags of `interlace bench serve`, and which of them go together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from interlace.cli.parser import UsageError

DATASETS = ("random", "shared-prefix", "sharegpt", "trace", "file")
PROCESSES = ("closed", "poisson", "gamma", "constant", "trace")
NUM_PROMPTS = {"trace": 1000, "file": None}
"""Dataset → requests if no number is given (None: all); 100 of the others."""
FLAGS_OF = {
    "input_len": ("random", "shared-prefix"),
    "prefix_len": ("shared-prefix",),
    "num_prefixes": ("shared-prefix",),
    "length_scale": ("trace",),
    "max_len": ("trace", "sharegpt"),
}
"""Flag → datasets it has a meaning for."""


def add_serve(benchmarks: Any) -> None:
    """Declare `bench serve`."""
    parser = benchmarks.add_parser(
        "serve",
        help="load on a server, ours or any other",
        description="Send requests to a server with OpenAI's streaming API and measure what its clients see. --model "
        "is the name that requests say (default: the first one the server lists); --seed draws prompts and arrivals.",
    )
    _add_target(parser)
    _add_workload(parser)
    _add_arrivals(parser)
    parser.add_argument("--slo", metavar="LIST", help="targets for goodput, such as ttft=200ms,tpot=30ms,e2e=5s")
    parser.add_argument("--self-test", action="store_true", help="measure first what this client itself adds")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON; -: on stdout, instead of the tables")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the course of the run and the CDFs of its latencies")
    parser.add_argument("--requests-file", metavar="FILE", help="write what happened to each request, a JSON line each")


def _add_target(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base-url", metavar="URL", default="http://127.0.0.1:8000/v1", help="with the version (%(default)s)")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="what is asked (completions)")
    add("--api-key-file", metavar="FILE", help="file with the key (default: the variable OPENAI_API_KEY, if it is set)")
    add(
        "--tokenizer",
        metavar="NAME",
        help="model or folder whose tokenizer the server has, for exact lengths; none: count words "
        "(default: the served model, if it is installed here)",
    )
    add("--timeout", type=float, default=600.0, metavar="S", help="of one request; 0: none (600)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    add(
        "--ignore-eos",
        choices=("auto", "on", "off"),
        default="auto",
        help="ask for answers of exactly the wanted length: if the server takes it, always, never (auto)",
    )
    add("--extra-body", metavar="JSON", help="further fields of every request, as a JSON object")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="what is asked (random; of a file, what it is)")
    add(
        "--dataset-path", metavar="FILE", help="a ShareGPT file, a trace (Azure, BurstGPT, Mooncake) or a workload file"
    )
    add("--num-prompts", type=_at_least(1), metavar="N", help="requests (100; of a trace 1,000; of a file, all)")
    add("--input-len", metavar="LENGTH", help="tokens in: 256, 64-256, normal:256,64, lognormal:256,0.8 (128)")
    add("--output-len", metavar="LENGTH", help="tokens out, likewise (128; else as the data says)")
    add("--prefix-len", type=_at_least(1), metavar="N", help="of shared-prefix: tokens of each prefix (512)")
    add("--num-prefixes", type=_at_least(1), metavar="N", help="of shared-prefix: different prefixes (8)")
    add("--length-scale", type=float, metavar="F", help="of a trace: lengths are multiplied by this (1)")
    add("--max-len", type=_at_least(2), metavar="N", help="of data: leave out requests of more tokens, in and out")


def _add_arrivals(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--arrival",
        choices=PROCESSES,
        help="how requests come (a trace: as it says; with --request-rate: poisson; else closed: one after the other)",
    )
    add("--request-rate", metavar="R", help="requests per second; A:B ramps from A to B")
    add("--ramp", choices=("linear", "exponential"), default="linear", help="form of the ramp (linear)")
    add("--ramp-duration", type=float, metavar="S", help="how long the ramp takes (until the last request)")
    add("--burstiness", type=float, metavar="B", help="of gamma arrivals: below 1 is burstier than poisson (1)")
    add("--time-scale", type=float, metavar="F", help="of a trace: its times are multiplied by this (1)")
    add("--max-concurrency", type=_at_least(1), metavar="N", help="requests under way at once (closed: 16; else any)")
    add("--num-warmups", type=_at_least(0), default=4, metavar="N", help="requests before, which do not count (4)")


def _at_least(least: int) -> Any:
    def count(word: str) -> int:
        value = int(word)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small, the least is {least}")
        return value

    return count


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what would be ignored or fail later, before anything is sent."""
    from interlace.bench.serve.traces import detect_format
    from interlace.bench.workloads import WorkloadError, is_sharegpt_file

    if args.plot:
        from interlace.bench.serve.plot import check_plot

        check_plot(Path(args.plot))
    if args.dataset is None:
        args.dataset = "random"
        if args.dataset_path is not None:
            path = Path(args.dataset_path)
            try:
                args.dataset = "sharegpt" if is_sharegpt_file(path) else "trace"
                if args.dataset == "trace":
                    detect_format(path)
            except WorkloadError:
                args.dataset = "file"
    if args.dataset in ("trace", "file") and args.dataset_path is None:
        raise UsageError(f"--dataset {args.dataset} needs --dataset-path FILE")
    if args.dataset in ("random", "shared-prefix") and args.dataset_path is not None:
        raise UsageError(f"--dataset {args.dataset} reads no file: leave out --dataset-path, or --dataset")
    for flag, datasets in FLAGS_OF.items():
        if getattr(args, flag) is not None and args.dataset not in datasets:
            raise UsageError(f"--{flag.replace('_', '-')} goes with --dataset {' or '.join(datasets)} only")
    if args.dataset == "trace" and args.output_len is not None:
        raise UsageError("--output-len does not go with a trace, which has its own lengths (see --length-scale)")
    _check_arrival_flags(args)


def _check_arrival_flags(args: argparse.Namespace) -> None:
    if args.arrival is None:
        rated = "gamma" if args.burstiness is not None else "poisson"
        args.arrival = rated if args.request_rate else "trace" if args.dataset == "trace" else "closed"
    is_rated = args.arrival in ("poisson", "gamma", "constant")
    if is_rated and not args.request_rate:
        raise UsageError(f"--arrival {args.arrival} needs --request-rate")
    if args.request_rate and not is_rated:
        raise UsageError(f"--request-rate does not go with --arrival {args.arrival}")
    if args.arrival == "trace" and args.dataset != "trace":
        raise UsageError("--arrival trace goes with --dataset trace only")
    if args.burstiness is not None and args.arrival != "gamma":
        raise UsageError("--burstiness goes with --arrival gamma only")
    if args.time_scale is not None and args.arrival != "trace":
        raise UsageError("--time-scale goes with --arrival trace only")
    if args.ramp_duration is not None and ":" not in (args.request_rate or ""):
        raise UsageError("--ramp-duration goes with a ramp only: --request-rate A:B")
    for flag in ("time_scale", "length_scale"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{flag.replace('_', '-')} {value:g}: it must be a number above 0")
