"""`interlace bench serve`: the order of a run, from flags to report."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.cli.bench_serve_flags import NUM_PROMPTS, check_flags
from interlace.cli.parser import UsageError

if TYPE_CHECKING:
    from interlace.bench.serve.arrivals import Arrivals, Rate
    from interlace.bench.serve.lengths import Lengths
    from interlace.bench.serve.load import LoadRun, Watcher
    from interlace.bench.serve.report import ServeReport
    from interlace.bench.serve.target import Target
    from interlace.bench.serve.workloads import PromptMaker, ServeWorkload
    from interlace.clock import Clock
    from interlace.config import LoadedSettings


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Run the load and report it; 1 if no request succeeded."""
    import msgspec

    from interlace.bench.serve.tables import print_serve_report

    check_flags(args)
    report, load = asyncio.run(_measure(args, loaded))
    if args.requests_file:
        _write(args.requests_file, b"".join(msgspec.json.encode(one) + b"\n" for one in load.exchanges))
    if args.plot:
        from interlace.bench.serve.plot import write_plot

        write_plot(Path(args.plot), report, load.exchanges)
    text = msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
    if args.json == "-":
        sys.stdout.write(text.decode())
        return int(report.completed == 0)
    if args.json:
        _write(args.json, text)
    print_serve_report(report)
    return int(report.completed == 0)


def _write(name: str, data: bytes) -> None:
    try:
        Path(name).write_bytes(data)
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error}") from error


async def _measure(args: argparse.Namespace, loaded: LoadedSettings) -> tuple[ServeReport, LoadRun]:
    from interlace.bench.machine import inspect_machine
    from interlace.bench.serve.arrivals import arrival_times
    from interlace.bench.serve.load import Watcher, run_load
    from interlace.bench.serve.metrics import parse_slo
    from interlace.bench.serve.report import make_report, setup_of
    from interlace.bench.serve.self_test import measure_client
    from interlace.bench.serve.target import probe
    from interlace.clock import MonotonicClock

    machine, clock = inspect_machine(), MonotonicClock()
    slo_s = parse_slo(args.slo) if args.slo else {}
    arrivals, limit, seed = _arrivals(args), _max_concurrency(args), loaded.settings.seed or 0
    target = await _target(args, loaded)
    workload = _workload(args, target, seed)
    items, warmups = _split_warmups(workload, args)
    times = arrival_times(arrivals, len(items), seed, workload.times)
    target = await probe(target, items[0], clock, args.ignore_eos)
    self_test = None
    if args.self_test:
        _say("measuring this client against a server that does no work")
        self_test = await measure_client(target, items, times, clock, limit)
    if warmups:
        await run_load(target, warmups, [0.0] * len(warmups), clock, max_concurrency=limit)
    watcher = Watcher()
    async with asyncio.TaskGroup() as tasks:
        showing = tasks.create_task(_show(watcher, clock))
        load = await run_load(target, items, times, clock, max_concurrency=limit, watcher=watcher)
        showing.cancel()
    setup = setup_of(
        target,
        workload=workload.description,
        arrivals=arrivals.describe(),
        seed=seed,
        requests=len(items),
        warmups=len(warmups),
        max_concurrency=limit,
    )
    return make_report(setup, load, slo_s, self_test, machine), load


# ── What the flags ask for ──────────────────────────────────────────────────────────────────────────────────────


def _arrivals(args: argparse.Namespace) -> Arrivals:
    from interlace.bench.serve.arrivals import Arrivals

    return Arrivals(
        process=args.arrival,
        rate=_rate(args),
        burstiness=1.0 if args.burstiness is None else args.burstiness,
        time_scale=1.0 if args.time_scale is None else args.time_scale,
    )


def _rate(args: argparse.Namespace) -> Rate | None:
    from interlace.bench.serve.arrivals import Rate

    if not args.request_rate:
        return None
    first, _, last = args.request_rate.partition(":")
    try:
        start, end = float(first), float(last or first)
    except ValueError:
        raise UsageError(f"--request-rate {args.request_rate}: write requests per second, 5 or 1:20") from None
    return Rate(start=start, end=end, shape=args.ramp, duration_s=args.ramp_duration)


def _max_concurrency(args: argparse.Namespace) -> int | None:
    if args.max_concurrency is None and args.arrival == "closed":
        return 16
    limit: int | None = args.max_concurrency
    return limit


async def _target(args: argparse.Namespace, loaded: LoadedSettings) -> Target:
    from interlace.bench.serve.target import Target, TargetError, served_models

    key = _api_key(args)
    if loaded.source("model") == "command line":
        model = str(loaded.settings.model)
    else:
        names = await served_models(args.base_url, key)
        if not names:
            raise TargetError(f"{args.base_url} lists no model: name one with --model")
        model = names[0]
    return Target(
        base_url=args.base_url,
        endpoint=args.endpoint,
        model=model,
        api_key=key,
        timeout_s=args.timeout,
        temperature=args.temperature,
        extra_body=_extra_body(args.extra_body),
    )


def _api_key(args: argparse.Namespace) -> str | None:
    from interlace.config import environment

    if args.api_key_file is None:
        return environment().get("OPENAI_API_KEY") or None
    try:
        return Path(args.api_key_file).read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--api-key-file {args.api_key_file} cannot be read: {error}") from error


def _extra_body(text: str | None) -> dict[str, Any]:
    import msgspec

    if text is None:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise UsageError(f"--extra-body should be a JSON object: {error}") from None


def _workload(args: argparse.Namespace, target: Target, seed: int) -> ServeWorkload:
    """The requests of the run and, where there are enough, those of the warm-up behind them."""
    from interlace.bench.serve import workloads

    path = None if args.dataset_path is None else Path(args.dataset_path)
    count: int | None = args.num_prompts or NUM_PROMPTS.get(args.dataset, 100)
    total = None if count is None else count + args.num_warmups
    outputs = None if args.output_len is None else _lengths(args.output_len)
    if args.dataset == "file":
        assert path is not None
        return workloads.file_workload(path, total, outputs, target.endpoint == "completions", seed)
    maker = _maker(args, target)
    if args.dataset == "trace":
        assert path is not None
        scale = args.length_scale or 1.0
        return workloads.trace_workload(maker, total, path=path, max_len=args.max_len, length_scale=scale, seed=seed)
    assert total is not None
    if args.dataset == "sharegpt":
        return workloads.sharegpt_workload(maker, total, path=path, outputs=outputs, max_len=args.max_len, seed=seed)
    inputs, outputs = _lengths(args.input_len or "128"), outputs or _lengths("128")
    if args.dataset == "random":
        return workloads.random_workload(maker, total, inputs=inputs, outputs=outputs, seed=seed)
    groups, prefix_len = args.num_prefixes or 8, args.prefix_len or 512
    return workloads.shared_prefix_workload(
        maker, total, groups=groups, prefix_len=prefix_len, inputs=inputs, outputs=outputs, seed=seed
    )


def _split_warmups(workload: ServeWorkload, args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """(measured, warm-up) requests. The warm-up takes others than the run, which might find its prefixes cached;
    only where the data has no more does it take the same."""
    items = workload.items
    asked = args.num_prompts or NUM_PROMPTS.get(args.dataset, 100)
    count = len(items) if asked is None else min(asked, len(items))
    if args.num_prompts is not None and count < args.num_prompts:
        raise UsageError(f"--num-prompts {args.num_prompts}: {args.dataset_path} has only {len(items)} usable requests")
    return items[:count], (items[count:] or items[: args.num_warmups]) if args.num_warmups else []


def _maker(args: argparse.Namespace, target: Target) -> PromptMaker:
    from interlace.bench.serve.vocabulary import common_words, load_tokenizer, words_of
    from interlace.bench.serve.workloads import PromptMaker
    from interlace.catalog import installed_models

    takes_ids = target.endpoint == "completions"
    name = args.tokenizer
    if name is None and target.model in {model.name for model in installed_models()}:
        name = target.model
    if name is None or name == "none":
        _say("lengths are in words, since the server's tokenizer is not known here (--tokenizer)")
        return PromptMaker(common_words(), takes_ids)
    return PromptMaker(words_of(load_tokenizer(name)), takes_ids)


def _lengths(text: str) -> Lengths:
    from interlace.bench.serve.lengths import parse_lengths

    return parse_lengths(text)


# ── On stderr, while it runs ────────────────────────────────────────────────────────────────────────────────────


async def _show(watcher: Watcher, clock: Clock) -> None:
    """One line on a terminal, twice a second: drawing it is the client's own work, so there is little of it."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from interlace.bench.serve.tables import status_line

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while True:
            live.update(Text(status_line(watcher, clock.now())), refresh=True)
            await asyncio.sleep(0.5)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
