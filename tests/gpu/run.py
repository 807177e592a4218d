"""Check and measure the GPU path on this machine: python tests/gpu/run.py [--quick] [--only NAME] [--json FILE]

Needs one NVIDIA GPU and the requirements of the engine, but neither a network, nor the package installed, nor its C++
kernels built. Exit status: 0 if all went well, 1 if a check failed or a measurement could not be made, 2 if nothing
could be run. docs/gpu.md has more.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu_checkout import ROOT, make_site, missing_packages  # noqa: E402
from gpu_jobs import Job, Report, format_table, run_job  # noqa: E402
from gpu_plan import plan  # noqa: E402

NO_GPU = (
    "There is no GPU here that torch can use, so nothing was run; the checks alone run without one, slowly: "
    "--device cpu --interpret --quick"
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--interpret", action="store_true", help="with --device cpu: kernels in Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="jobs whose name contains NAME")
    parser.add_argument("--list", action="store_true", help="show the names of all jobs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was found, with tracebacks")
    parser.add_argument("--minutes", type=float, default=7.8, help="after which nothing more is begun (default 7.8)")
    parser.add_argument("--workers", type=int, default=0, help="checks that run side by side (default: by CPU cores)")
    options = parser.parse_args(arguments)
    if (options.device == "cpu") != options.interpret:
        parser.error("--device cpu and --interpret belong together: on the CPU, kernels run in Triton's interpreter")
    return options


def choose(jobs: list[Job], only: list[str]) -> list[Job]:
    """Those whose names contain one of `only`; all if that is empty."""
    for name in only:
        if not any(name in job.name for job in jobs):
            known = ", ".join(job.name for job in jobs)
            print(f"--only {name}: no job has that in its name; they are {known}", file=sys.stderr)
            sys.exit(2)
    return [job for job in jobs if not only or any(name in job.name for name in only)]


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    import torch

    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")},
    }
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        found["commit"] = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def environment(site: Path, interpret: bool) -> dict[str, str]:
    """Of the jobs: this checkout as `interlace`, no settings of the user's, no network."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("INTERLACE_", "TRITON_INTERPRET"))
    }
    paths = [str(site), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if interpret:
        own["TRITON_INTERPRET"] = "1"
    return {**kept, **own}


def tell(report: Report) -> None:
    """One line and the tables of a job that is done."""
    outcome = report.outcome
    checks = f"{outcome.num_checks} checks" if outcome.num_checks else ""
    state = f"FAILED {report.error}" if report.error else "FAILED" if outcome.failures else "ok"
    print(f"{report.name:<28} {report.seconds:6.1f} s  {state}  {checks}".rstrip(), flush=True)
    for name, error in outcome.failures.items():
        print(f"    {name}: {error}"[:400])
    for table in outcome.tables:
        print(format_table(table), flush=True)


def run(jobs: list[Job], options: argparse.Namespace, given: dict[str, str]) -> list[Report]:
    """Checks side by side, since most of their time is compiling; then measurements, one at a time."""
    began = time.monotonic()

    def left() -> float:
        return 60 * options.minutes - (time.monotonic() - began)

    reports: list[Report] = []
    checks = [job for job in jobs if not job.measures]
    workers = options.workers or max(1, min(15, (os.cpu_count() or 1) - 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(lambda job=job: run_job(job, {}, given, left())) for job in checks]
        for future in concurrent.futures.as_completed(running):
            reports.append(future.result())
            tell(reports[-1])
    values: dict[str, float] = {}
    for job in jobs:
        if job.measures:
            reports.append(run_job(job, values, given, left()))
            values |= reports[-1].outcome.values
            tell(reports[-1])
    return reports


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    jobs = choose(plan(options.device, options.quick), options.only)
    if options.list:
        print("\n".join(job.name for job in jobs))
        return 0
    if options.device == "cuda":
        try:
            import torch

            usable = torch.cuda.is_available()
        except ImportError:
            usable = False
        if not usable:
            print(NO_GPU)
            return 2
    if missing := missing_packages():
        print(f"These packages are missing: {', '.join(missing)}. Install them, or name their folder in PYTHONPATH.")
        return 2
    began = time.monotonic()
    found = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="interlace-site-") as folder:
        reports = run(jobs, options, environment(make_site(Path(folder)), options.interpret))
    if options.json:
        content = {"machine": found, "jobs": [dataclasses.asdict(report) for report in reports]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    bad = [report.name for report in reports if not report.is_good]
    checks = sum(report.outcome.num_checks for report in reports)
    took = f"{len(reports)} jobs, {checks} checks, {time.monotonic() - began:.0f} s"
    print(f"{took}; failed: {', '.join(bad)}" if bad else f"{took}; all good")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
