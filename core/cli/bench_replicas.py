"""`interlace bench router` and `replicas`: what routing costs, and what it brings."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from interlace.cli.parser import UsageError

if TYPE_CHECKING:
    from interlace.config import LoadedSettings

NAMES = ("router", "replicas")
_COUNTS = (
    ("--groups", 24, "different beginnings (24)"),
    ("--per-group", 8, "prompts with each beginning (8)"),
    ("--prefix-len", 256, "tokens of a beginning (256)"),
    ("--own-len", 32, "tokens of each prompt's own (32)"),
    ("--output-len", 16, "tokens out (16)"),
    ("--concurrency", 8, "requests that are unfinished at any time (8)"),
    ("--repeat", 1, "runs of each router, of which the median counts (1)"),
)


def add_replicas(benchmarks: Any) -> None:
    """Declare them."""
    router = benchmarks.add_parser(
        "router",
        help="what routing costs a request",
        description="Time every installed router, and all that replicas add to the way of a request, with engines that "
        "take no time. Half of each prompt is one of 50 beginnings.",
    )
    _add_count(router, "--num-replicas", 4, "replicas to choose from (4)")
    _add_count(router, "--repeat", 5, "runs, of which the best counts (5)")
    replicas = benchmarks.add_parser(
        "replicas",
        help="routers against each other on prompts with shared beginnings",
        description="Run the same prompts with shared beginnings through engine.replicas engines (2 if the settings "
        "say nothing), one router after the other, and report hit rates and throughput. Greedy, exact lengths. What "
        "the caches hold decides: see cache.memory and cache.max_blocks.",
    )
    replicas.add_argument("routers", nargs="*", metavar="ROUTER", help="(prefix_affinity least_loaded round_robin)")
    for flag, default, text in _COUNTS:
        _add_count(replicas, flag, default, text)
    for parser in (router, replicas):
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_count(parser: argparse.ArgumentParser, flag: str, default: int, text: str) -> None:
    parser.add_argument(flag, type=int, default=default, metavar="N", help=text)


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Run the one that was asked for."""
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    return _router(args, loaded) if args.benchmark == "router" else _replicas(args, loaded)


def _router(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    from interlace.bench.routing import measure_routing
    from interlace.plugin_manager import PluginManager
    from interlace.resolve import select_components

    plugins = PluginManager(loaded.settings)
    costs = []
    for name in plugins.registry("routers").names():
        (router,) = select_components(_with_router(loaded, name), plugins)["routers"]
        costs += measure_routing(name, router.build, args.num_replicas, args.repeat)
    if args.json:
        _print_json(costs)
        return 0
    from interlace.cli.tables import print_table

    print(f"{args.num_replicas} replicas, best of {args.repeat} runs\n")
    print_table(
        ("router", "prompt tokens", "µs in the router", "routes/s", "µs added in all"),
        (
            [
                cost.router,
                f"{cost.prompt_tokens}",
                f"{cost.route_us:.1f}",
                f"{cost.routes_per_s:,.0f}",
                f"{cost.added_us:.1f}",
            ]
            for cost in costs
        ),
    )
    return 0


def _replicas(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    from interlace.bench.replicas import SharedPrefixes, compare_routers

    workload = SharedPrefixes(
        groups=args.groups,
        per_group=args.per_group,
        prefix_len=args.prefix_len,
        own_len=args.own_len,
        output_len=args.output_len,
    )
    runs = compare_routers(
        partial(_with_router, loaded),
        args.routers or ("prefix_affinity", "least_loaded", "round_robin"),
        workload,
        concurrency=args.concurrency,
        repeat=args.repeat,
        seed=loaded.settings.seed or 0,
        say=_say,
    )
    if args.json:
        _print_json({"workload": workload, "concurrency": args.concurrency, "runs": runs})
        return 0
    from interlace.cli.tables import print_table

    count = args.groups * args.per_group
    print(
        f"{count} requests, {args.concurrency} at a time: {args.groups} beginnings of {args.prefix_len} tokens, "
        f"{args.own_len} of their own, {args.output_len} out\n{len(runs[0].kv_blocks)} replicas with "
        f"{' and '.join(str(blocks) for blocks in runs[0].kv_blocks)} KV blocks\n"
    )
    print_table(
        ("router", "hit rate", "requests/s", "output tokens/s", "TTFT p50", "TTFT p99", "requests of each replica"),
        (
            [
                run.router,
                f"{run.hit_rate:.1%}",
                f"{run.requests_per_s:.2f}",
                f"{run.output_tokens_per_s:.1f}",
                f"{run.ttft_p50_s * 1000:.0f} ms",
                f"{run.ttft_p99_s * 1000:.0f} ms",
                ", ".join(str(number) for number in run.requests_of_replicas),
            ]
            for run in runs
        ),
    )
    return 0


def _with_router(loaded: LoadedSettings, name: str) -> LoadedSettings:
    """The same settings with another router, and at least two replicas."""
    from interlace.config import LoadedSettings

    settings, source = loaded.settings, "interlace bench"
    engine = settings.engine.model_copy(update={"replicas": max(2, settings.engine.replicas)})
    router = settings.router.model_copy(update={"use": name})
    changed = settings.model_copy(update={"engine": engine, "router": router})
    return LoadedSettings(changed, {**loaded.sources, "engine.replicas": source, "router.use": source})


def _print_json(report: Any) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
