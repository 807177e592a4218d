"""`interlace bench host`, `executor`, `kernels`, `step`, `startup`: parts of an engine, each measured alone."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from interlace.cli.parser import UsageError

if TYPE_CHECKING:
    from interlace.bench.kernels import OpResult
    from interlace.config import LoadedSettings


def add_parts(benchmarks: Any) -> None:
    """Declare them."""
    host = benchmarks.add_parser(
        "host",
        help="the engine's own cost per step",
        description="Time the engine with an executor that takes no time: decode steps, and adding and admitting a "
        "thousand requests of 1,024 tokens. The selected scheduler plans.",
    )
    _add_repeat(host, "runs, of which the best counts (5)")
    executor = benchmarks.add_parser(
        "executor",
        help="what the executor adds to a step",
        description="Time decode steps on the selected executor against what its worker says of them: the rest is "
        "handing out plans and bringing back results. Counts what is said for it, and what ranks exchange.",
    )
    executor.add_argument("--requests", default="1,16,256", metavar="N,…", help="requests of a step (1,16,256)")
    executor.add_argument("--steps", type=int, default=200, metavar="N", help="steps; medians are reported (200)")
    kernels = benchmarks.add_parser(
        "kernels",
        help="each op against the limits of the machine",
        description="Time every op of the model alone, with the kernels and attention that the settings choose, "
        "against memory bandwidth and matrix products measured in the same run.",
    )
    kernels.add_argument("ops", nargs="*", metavar="OP", help="only ops whose name starts so (linear, attention, …)")
    step = benchmarks.add_parser(
        "step",
        help="where the time of a decode step goes",
        description="Run decode steps of equal requests on a worker alone and print what each part and op takes.",
    )
    step.add_argument("--batch-size", type=int, default=64, metavar="N", help="requests (64)")
    step.add_argument("--context", type=int, default=256, metavar="N", help="tokens of each before (256)")
    step.add_argument("--steps", type=int, default=20, metavar="N", help="steps; medians are reported (20)")
    startup = benchmarks.add_parser(
        "startup",
        help="from process start to the first token",
        description="Start fresh processes and time them until their first token, with what the engine says of the "
        "parts. With --packages, time `interlace plugins list` instead, with that many generated packages installed "
        "beside the real ones; no model is loaded then.",
    )
    startup.add_argument("--packages", type=int, metavar="N", help="generated packages")
    _add_repeat(startup, "counted runs (5)")
    for parser in (host, executor, kernels, step, startup):
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_repeat(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help=text)


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Run the one that was asked for."""
    if getattr(args, "repeat", 1) < 1:
        raise UsageError("--repeat must be at least 1")
    parts = {"host": _host, "executor": _executor, "kernels": _kernels, "step": _step, "startup": _startup}
    return parts[args.benchmark](args, loaded)


def _print_json(report: Any) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")


def _host(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    from interlace.bench.host import measure_host
    from interlace.plugin_manager import PluginManager
    from interlace.resolve import resolve

    policy = resolve(loaded, PluginManager(loaded.settings)).scheduler
    report = measure_host(policy.label, policy.build, args.repeat)
    if args.json:
        _print_json(report)
        return 0
    from interlace.cli.tables import print_table

    rows = [[f"{step.requests}", step.groups, f"{step.microseconds:.1f}"] for step in report.steps]
    print(f"scheduler {report.scheduler}, best of {args.repeat} runs\n")
    print_table(("requests decoding", "kv groups", "µs a step"), rows)
    print()
    for added in report.added:
        print(
            f"1,000 requests of 1,024 tokens, {added.shared_tokens} of them shared: "
            f"{added.add_ms:.1f} ms to add, {added.hash_ms:.1f} ms to hash, {added.admit_ms:.1f} ms to admit"
        )
    return 0


def _executor(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    from interlace.plugin_manager import PluginManager
    from interlace.resolve import resolve

    spec = resolve(loaded, PluginManager(loaded.settings))
    counts = args.requests.split(",")
    most = spec.limits.max_num_seqs
    if args.steps < 1 or not all(count.isdecimal() and 1 <= int(count) <= most for count in counts):
        raise UsageError(f"--requests takes numbers from 1 to {most} with commas between them; --steps at least 1")

    from interlace.bench.executor import ExecutorReport, measure_executor

    measured = []
    for found in measure_executor(spec, [int(count) for count in counts], args.steps):
        measured.append(found)
        _say(f"{found.requests} requests: {found.overhead_us:.0f} µs of {found.step_us:.0f}")
    chosen = spec.executor
    if args.json:
        _print_json(ExecutorReport(executor=chosen.name, options=chosen.options, steps=measured))
        return 0
    from interlace.cli.tables import print_table

    print(f"executor {chosen.name}: medians of {args.steps} decode steps\n")
    print_table(
        ("requests", "µs a step", "in the worker", "overhead", "plan", "result", "exchanged by a rank"),
        (
            [
                f"{one.requests}",
                f"{one.step_us:.0f}",
                f"{one.worker_us:.0f}",
                f"{one.overhead_us:.0f}",
                f"{one.plan_bytes} B",
                f"{one.result_bytes} B",
                ", ".join(f"{kind} {nbytes} B" for kind, nbytes in one.exchanged_bytes.items()) or "nothing",
            ]
            for one in measured
        ),
    )
    return 0


def _kernels(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    from interlace.plugin_manager import PluginManager
    from interlace.resolve import resolve

    spec = resolve(loaded, PluginManager(loaded.settings))
    import torch

    from interlace.bench.kernels import KernelReport, Peaks, measure_kernels
    from interlace.worker.sizing import plan_attention, plan_kernels

    chosen = plan_attention(spec, spec.architecture.load()).selections + plan_kernels(spec)[1]
    results: list[OpResult] = []
    peaks: Peaks | None = None
    for found in measure_kernels(spec, args.ops):
        if isinstance(found, Peaks):
            peaks = found
            _say(f"measured here: reads {found.read_gb_s:.1f} GB/s, products {found.gflop_s:.0f} GFLOP/s")
        else:
            results.append(found)
            _say(f"{found.op} {found.shape}, {found.rows} rows: {found.microseconds:.1f} µs")
    if peaks is None or not results:
        raise UsageError(f"no op's name starts with {' or '.join(args.ops)}; try linear, attention, rms_norm, argmax")
    if args.json:
        _print_json(
            KernelReport(
                model=spec.model,
                dtype=spec.dtype,
                threads=torch.get_num_threads(),
                peaks=peaks,
                selections=[(made.kind, made.name, made.reason) for made in chosen],
                results=results,
            )
        )
        return 0
    print(f"{spec.dtype}, {torch.get_num_threads()} threads")
    print(f"limits measured by torch just now: reads {peaks.read_gb_s:.1f} GB/s, products {peaks.gflop_s:.0f} GFLOP/s")
    for made in chosen:
        print(f"{made.kind} {made.name}: {made.reason}")
    print()
    _print_ops(results)
    return 0


def _print_ops(results: list[OpResult]) -> None:
    from interlace.cli.tables import print_table

    print_table(
        ("op", "shape", "rows", "µs", "GB/s", "GFLOP/s", "% of the limit"),
        (
            [
                one.op,
                one.shape,
                f"{one.rows}",
                f"{one.microseconds:.1f}",
                f"{one.gb_s:.1f}",
                f"{one.gflop_s:.0f}",
                f"{one.percent_of_limit:.0f}",
            ]
            for one in results
        ),
    )


def _step(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    from interlace.plugin_manager import PluginManager
    from interlace.resolve import resolve

    spec = resolve(loaded, PluginManager(loaded.settings))
    if min(args.batch_size, args.context, args.steps) < 1 or args.batch_size > spec.limits.max_num_seqs:
        raise UsageError(f"--batch-size must be 1 to {spec.limits.max_num_seqs}; --context and --steps at least 1")

    from interlace.bench.step import profile_step

    profile = profile_step(spec, args.batch_size, args.context, args.steps)
    if args.json:
        _print_json(profile)
        return 0
    from interlace.cli.tables import print_table

    print(f"{profile.requests} requests at {profile.context} tokens: {profile.total / 1000:.2f} ms a step\n")
    rows = [[name, f"{value:.0f}", f"{100 * value / profile.total:.1f}"] for name, value in profile.parts.items()]
    print_table(("part", "µs", "% of the step"), rows)
    return 0


def _startup(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    if args.packages is not None:
        return _listing(args)
    from interlace.bench.startup import measure_start

    report = measure_start(loaded.settings, args.repeat)
    if args.json:
        _print_json(report)
        return 0
    times = sorted(run.first_token for run in report.runs)
    print(f"process start to first token: {report.first_token:.2f} s ({times[0]:.2f} to {times[-1]:.2f})")
    print(f"  processor time              {report.cpu:6.2f} s")
    for name, seconds in report.parts.items():
        print(f"  engine, {name:<20}{seconds:6.2f} s")
    return 0


def _listing(args: argparse.Namespace) -> int:
    from interlace.bench.plugins import measure_listing

    times = measure_listing(args.packages, args.repeat)
    if args.json:
        _print_json(times)
        return 0
    print(f"interlace plugins list with {times.packages} more packages: {times.command_s * 1000:.0f} ms")
    print(f"  of which on a processor              {times.command_cpu_s * 1000:6.1f} ms")
    print(f"  an interpreter that does nothing     {times.interpreter_s * 1000:6.1f} ms")
    print(f"  reading the metadata of all packages {times.find_s * 1000:6.1f} ms")
    print(f"  importing the plugins and asking them{times.discover_s * 1000:6.1f} ms")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
