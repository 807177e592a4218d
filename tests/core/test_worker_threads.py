"""How many threads, and how much memory, a process in a container takes: read from control files that tests write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from interlace.config import load_settings
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve
from interlace.worker.control_group import cpu_quota, memory_room
from interlace.worker.threads import ThreadPlan, bind, default_threads, plan_threads
from interlace.worker.worker import Worker


def tree(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """(root of the control groups, the file that says which ones this process is in)."""
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "membership").write_text(membership)
    return root / "cgroup", root / "membership"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),  # the outer limit binds
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/not/visible\n", {"cpu.max": "300000 100000"}, 3.0),  # a container that sees its group as the root
        ("3:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "400000",
                                "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 4.0),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "garbage"}, None),
    ],
)  # fmt: skip
def test_quota(tmp_path, membership, files, quota):
    assert cpu_quota(*tree(tmp_path, membership, files)) == quota


def test_no_control_groups_at_all(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "none") is None
    assert memory_room(tmp_path, tmp_path / "none") is None


def test_memory_room(tmp_path):
    two = tree(tmp_path / "v2", "0::/a\n", {"a/memory.max": "1000", "a/memory.current": "400", "memory.max": "max"})
    assert memory_room(*two) == 600
    files = {"memory/m/memory.limit_in_bytes": "500", "memory/m/memory.usage_in_bytes": "700"}
    assert memory_room(*tree(tmp_path / "v1", "4:memory:/m\n", files)) == 0


@pytest.mark.parametrize(
    ("quota", "count"), [(None, 4), (8.0, 4), (4.0, 4), (3.6, 4), (3.5, 3), (1.5, 1), (1.6, 2), (0.2, 1)]
)
def test_quota_bounds_the_cores(tmp_path, quota, count):
    plan = default_threads({0, 1, 2, 3}, quota, tmp_path)
    assert plan.count == count
    assert ("quota" in plan.reason) == (count < 4)


def test_two_hardware_threads_are_one_core(tmp_path):
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert default_threads({0, 1, 2, 3}, None, tmp_path).count == 2
    assert default_threads({0, 2}, None, tmp_path).count == 1


def test_setting_and_affinity_are_respected():
    assert plan_threads(1) == ThreadPlan(1, "threads")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert plan_threads(0).count == 1
        reason = "threads; only 1 can run at once (one per core this process may use)"
        assert plan_threads(3) == ThreadPlan(3, reason, is_crowded=True)
    finally:
        os.sched_setaffinity(0, allowed)


def test_processors_are_bound_only_where_some_are_named(monkeypatch):
    calls = []
    monkeypatch.setattr("os.sched_setaffinity", lambda process, cores: calls.append((process, cores)))
    bind(())
    bind((0, 2))
    assert calls == [(0, (0, 2))]


@pytest.mark.parametrize(("kernels", "left"), [("torch", 2), ("native", 1)])
def test_torch_computes_with_threads_where_it_runs_the_steps_only(tmp_path, kernels, left):
    """While weights are packed by other threads, its own would wait busily beside them."""
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {"model": str(tmp_path), "checkpoint.use": "dummy", "dtype": "float32", "threads": 2, "max_model_len": 64}
    given |= {"kernels.use": kernels, "attention.use": kernels, "cache.memory": "1MiB", "executor.use": "uniprocess"}
    loaded = load_settings(given, env={})
    loading = []
    worker = Worker(
        resolve(loaded, PluginManager(loaded.settings)), lambda event: loading.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    try:
        worker.start()
        assert set(loading) == {1}
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)
        worker.shutdown()
