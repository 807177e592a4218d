"""`interlace bench`: how fast an engine is, measured through the same path that `LLM` takes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.cli.parser import UsageError

if TYPE_CHECKING:
    from interlace.bench.report import Report
    from interlace.bench.session import Session
    from interlace.bench.workloads import WorkItem, Workload
    from interlace.config import LoadedSettings

DATASETS = ("random", "sharegpt")


def add_parser(subparsers: Any) -> None:
    """Declare the benchmarks."""
    from interlace.cli.bench_parts import add_parts
    from interlace.cli.bench_replicas import add_replicas
    from interlace.cli.bench_serve_flags import add_serve

    parser = subparsers.add_parser("bench", help="measure an engine, its parts, or a server", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK")
    _add_throughput(benchmarks)
    _add_latency(benchmarks)
    _add_prefill(benchmarks)
    add_parts(benchmarks)
    add_replicas(benchmarks)
    add_serve(benchmarks)


def _add_throughput(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "throughput",
        help="many requests at once",
        description="Hand in all requests at once and measure until the last token. Greedy, exact lengths. The seed "
        "setting (--seed, else 0) draws the workload.",
    )
    parser.add_argument("--dataset", choices=DATASETS, help="where the prompts come from (random)")
    parser.add_argument(
        "--dataset-path",
        metavar="FILE",
        help="a workload file, a JSON array of {prompt_token_ids, max_tokens}; or a ShareGPT file",
    )
    parser.add_argument(
        "--save-workload", metavar="FILE", help="write the requests to a workload file, for other engines"
    )
    _add_count(parser, "--num-prompts", None, "requests (64; of a workload file, all)")
    _add_count(parser, "--input-len", None, "tokens in, of a random prompt (128)")
    _add_count(parser, "--output-len", None, "tokens out (random: 128; else as the data says)")
    _add_count(parser, "--prefix-len", None, "tokens that all random prompts share, before their own (0)", least=0)
    _add_count(parser, "--num-warmups", 4, "requests run before, untimed, with short answers (4)", least=0)
    _add_count(parser, "--repeat", 1, "timed runs; the median and the range are reported (1)")
    parser.add_argument("--plugin-cost", action="store_true", help="report the time spent in each plugin, too")
    parser.add_argument(
        "--processors",
        type=_processors,
        metavar="JSON",
        help='logits processors that every request names, with their arguments: \'{"no_repeat_ngram": {"size": 3}}\'',
    )
    _add_common(parser)


def _add_latency(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "latency",
        help="one batch at a time",
        description="Run one batch of equal requests again and again. Greedy, exact lengths.",
    )
    _add_count(parser, "--input-len", 32, "tokens in (32)")
    _add_count(parser, "--output-len", 128, "tokens out (128)")
    _add_count(parser, "--batch-size", 8, "requests of a batch (8)")
    _add_count(parser, "--num-iters", 10, "timed iterations (10)")
    _add_count(parser, "--num-iters-warmup", 2, "untimed iterations before (2)", least=0)
    _add_common(parser)


def _add_prefill(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "prefill",
        help="prompts alone",
        description="Random prompts, all at once, with one token out of each: how fast prompts are read.",
    )
    _add_count(parser, "--num-prompts", 16, "prompts (16)")
    _add_count(parser, "--input-len", 1024, "tokens in (1024)")
    _add_count(parser, "--repeat", 3, "timed runs; the median and the range are reported (3)")
    _add_common(parser)
    parser.set_defaults(dataset=None, dataset_path=None, save_workload=None, output_len=1, prefix_len=None)
    parser.set_defaults(num_warmups=4, plugin_cost=False, processors=None)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--disable-detokenize", action="store_true", help="do not turn tokens into text")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _processors(text: str) -> dict[str, dict[str, Any]]:
    import msgspec

    try:
        return msgspec.json.decode(text, type=dict[str, dict[str, Any]])
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(f"should be a JSON object of objects: {error}") from None


def _add_count(parser: argparse.ArgumentParser, flag: str, default: int | None, text: str, least: int = 1) -> None:
    def count(word: str) -> int:
        value = int(word)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small, the least is {least}")
        return value

    parser.add_argument(flag, type=count, default=default, metavar="N", help=text)


def run(args: argparse.Namespace, loaded: LoadedSettings) -> int:
    """Run the benchmark and print its report; everything else goes to stderr."""
    if args.benchmark is None:
        parts = ("startup", "host", "executor", "kernels", "step", "router", "replicas")
        names = ("throughput", "latency", "prefill", *parts, "serve")
        raise UsageError(f"which benchmark? interlace bench {', bench '.join(names)}")
    if args.benchmark in ("startup", "host", "executor", "kernels", "step"):
        from interlace.cli import bench_parts

        return bench_parts.run(args, loaded)
    if args.benchmark in ("router", "replicas"):
        from interlace.cli import bench_replicas

        return bench_replicas.run(args, loaded)
    if args.benchmark == "serve":
        from interlace.cli import bench_serve

        return bench_serve.run(args, loaded)
    if args.benchmark == "throughput":
        _check_dataset_flags(args)
    report = _latency(args, loaded) if args.benchmark == "latency" else _throughput(args, loaded)
    if args.json:
        import msgspec

        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
    else:
        from interlace.bench.tables import print_report

        print_report(report)
    return 0


def _throughput(args: argparse.Namespace, loaded: LoadedSettings) -> Report:
    from interlace.bench.machine import inspect_machine
    from interlace.bench.report import make_report
    from interlace.bench.session import Session
    from interlace.bench.workloads import write_items

    machine = inspect_machine()
    with Session(loaded, detokenize=not args.disable_detokenize, processors=args.processors) as session:
        workload = _workload(args, session)
        if args.save_workload is not None:
            write_items(Path(args.save_workload), workload.items)
        _say_start(session, workload, machine.is_busy)
        session.warm_up(workload.items[: args.num_warmups])
        runs = []
        for number in range(args.repeat):
            runs.append(session.run(workload.items))
            _say_run(f"run {number + 1} of {args.repeat}", runs[-1])
        return make_report(args.benchmark, workload, runs, session, machine, args.plugin_cost)


def _latency(args: argparse.Namespace, loaded: LoadedSettings) -> Report:
    from interlace.bench.machine import inspect_machine
    from interlace.bench.report import make_report
    from interlace.bench.session import Session
    from interlace.bench.workloads import Workload, check_fits, random_items

    machine = inspect_machine()
    with Session(loaded, detokenize=not args.disable_detokenize) as session:
        spec = session.front.spec
        vocab_size = spec.model_config.vocab_size
        shape = {"input_len": args.input_len, "output_len": args.output_len}
        items = random_items(args.batch_size, **shape, vocab_size=vocab_size, seed=loaded.settings.seed or 0)
        check_fits(items, spec.max_model_len, vocab_size)
        text = f"batches of {args.batch_size} random prompts, {args.input_len} tokens in and {args.output_len} out"
        workload = Workload(f"{text}, {args.num_iters} iterations", items)
        _say_start(session, workload, machine.is_busy)
        for _ in range(args.num_iters_warmup):
            session.run(items)
        runs = []
        for number in range(args.num_iters):
            runs.append(session.run(items))
            _say_run(f"iteration {number + 1} of {args.num_iters}", runs[-1])
        return make_report("latency", workload, runs, session, machine)


# ── Workload of `throughput` ────────────────────────────────────────────────────────────────────────────────────


def _check_dataset_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would be ignored, before the engine is started."""
    is_random = args.dataset == "random" or (args.dataset is None and args.dataset_path is None)
    if is_random and args.dataset_path is not None:
        raise UsageError("--dataset random reads no file: leave out --dataset-path, or --dataset")
    for flag in ("input_len", "prefix_len"):
        if not is_random and getattr(args, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')} goes with --dataset random only")


def _workload(args: argparse.Namespace, session: Session) -> Workload:
    from interlace.bench.workloads import Workload, check_fits

    spec = session.front.spec
    description, items = _items(args, session)
    check_fits(items, spec.max_model_len, spec.model_config.vocab_size)
    return Workload(description, items)


def _items(args: argparse.Namespace, session: Session) -> tuple[str, list[WorkItem]]:
    """(description, requests) as the flags say."""
    from interlace.bench import sharegpt, workloads

    spec = session.front.spec
    seed = spec.seed or 0
    path = None if args.dataset_path is None else Path(args.dataset_path)
    if args.dataset == "sharegpt" or (path is not None and workloads.is_sharegpt_file(path)):
        items = sharegpt.sample_sharegpt(
            list(sharegpt.conversations(path)),
            lambda text: session.front.tokenizer.encode(text),
            args.num_prompts or 64,
            seed=seed,
            max_model_len=spec.max_model_len,
            output_len=args.output_len,
        )
        return f"ShareGPT conversations, seed {seed}", items
    if path is not None:
        return f"the first requests of {path.name}", workloads.read_items(path, args.num_prompts, args.output_len)
    input_len, output_len, prefix_len = args.input_len or 128, args.output_len or 128, args.prefix_len or 0
    shared = f", after {prefix_len} that all share" if prefix_len else ""
    items = workloads.random_items(
        args.num_prompts or 64,
        input_len=input_len,
        output_len=output_len,
        vocab_size=spec.model_config.vocab_size,
        seed=seed,
        prefix_len=prefix_len,
    )
    return f"random prompts, {input_len} tokens in{shared} and {output_len} out, seed {seed}", items


# ── On stderr, while it runs ────────────────────────────────────────────────────────────────────────────────────


def _say_start(session: Session, workload: Workload, is_busy: bool) -> None:
    from interlace.cli.startup import print_startup

    print_startup(session.front)
    if is_busy:
        _say("the machine is busy with other work: expect figures that are too low and vary")
    _say(
        f"{len(workload.items)} requests, {workload.num_prompt_tokens:,} tokens in, {workload.num_output_tokens:,} out"
    )


def _say_run(which: str, run: Any) -> None:
    from interlace.bench.metrics import rates

    found = rates(run)
    _say(f"{which}: {found.duration_s:.2f} s, {found.output_tokens_per_s:,.1f} output tokens/s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
