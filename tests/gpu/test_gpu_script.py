"""run.py says when it cannot run, and its checks run without a GPU in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process as on any machine: no GPU visible, nothing of the tests' own environment, another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)


def test_says_in_one_sentence_that_there_is_no_gpu():
    done = run()
    assert done.returncode == 2 and done.stderr == ""
    assert done.stdout.startswith("There is no GPU here") and done.stdout.count("\n") == 1


@pytest.mark.slow
def test_checks_run_in_the_interpreter(tmp_path):
    report = tmp_path / "report.json"
    done = run("--device", "cpu", "--interpret", "--quick", "--workers", "2", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = {job["name"]: job for job in json.loads(report.read_text())["jobs"]}
    assert {"attention.triton", "attention.triton_invariant", "attention.flash", "kernels", "sampling"} <= set(jobs)
    assert {"models", "parity.Llama"} <= set(jobs)
    assert all(job["outcome"]["num_checks"] and not job["outcome"]["failures"] for job in jobs.values())
    assert f"{len(jobs)} jobs" in done.stdout and "all good" in done.stdout


@pytest.mark.slow
def test_every_job_names_a_function_that_takes_its_arguments():
    """Those for a GPU, too, which no machine without one runs."""
    child = (
        "import importlib, inspect, sys; sys.path.insert(0, sys.argv[1]); from gpu_plan import plan\n"
        "for job in [*plan('cuda', False), *plan('cuda', True), *plan('cpu', True)]:\n"
        "    module, _, name = job.target.partition(':')\n"
        "    given = {**job.arguments, **({'values': {}} if job.measures else {})}\n"
        "    inspect.signature(getattr(importlib.import_module(module), name)).bind(**given)\n"
        "    print(job.name)"
    )
    command = [sys.executable, "-c", child, str(SCRIPT.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert {
        "limits",
        "speed.attention",
        "speed.sampling",
        "speed.8B",
        "transformers.continuous",
        "parity.Gemma3",
    } <= set(names)


@pytest.mark.slow
def test_what_fails_is_reported_and_the_others_still_run(tmp_path):
    """A measurement without a GPU cannot work; its neighbour is a check that can."""
    child = (
        "import json, sys, pathlib; sys.path.insert(0, sys.argv[1]); import run; from gpu_jobs import Job;"
        "run.plan = lambda *_: [Job('broken', 'gpu_speed:limits', {'quick': True}, 100, True),"
        " Job('killed', 'os:abort'), Job('late', 'time:sleep', {}, 0.0),"
        " Job('sampling', 'gpu_checks:sampling', {'device': 'cpu', 'seeds': [], 'vocab_sizes': [500]})];"
        "sys.exit(run.main(['--device', 'cpu', '--interpret', '--json', sys.argv[2]]))"
    )
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", child, str(SCRIPT.parent), str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    jobs = {job["name"]: job for job in json.loads(report.read_text())["jobs"]}
    assert jobs["sampling"]["error"] == "" and jobs["sampling"]["outcome"]["num_checks"] == 3
    assert jobs["broken"]["error"] and "Traceback" in jobs["broken"]["traceback"]
    assert "ended with code" in jobs["killed"]["error"] and "not done after" in jobs["late"]["error"]
    assert "failed: " in done.stdout
