"""How replicas share threads, memory and GPUs."""

from __future__ import annotations

import msgspec
import pytest

from interlace.assemble import make_replicas
from interlace.clock import VirtualClock
from interlace.config import load_settings
from interlace.engine.sharing import describe_shares, share_machine
from interlace.errors import ConfigError
from interlace.spec import CacheSpec, Component
from interlace.testing.front import front_spec


def spec(**fields):
    return msgspec.structs.replace(front_spec(10), **fields)


def executor(**options):
    return Component(kind="executors", name="many", target="nowhere:Many", options=options)


@pytest.mark.parametrize(
    ("threads", "count", "shares"), [(8, 2, [4, 4]), (5, 3, [1, 2, 2]), (7, 4, [1, 2, 2, 2]), (2, 3, [1, 1, 1])]
)
def test_threads_are_dealt_and_each_gets_one(threads, count, shares):
    specs = share_machine(spec(threads=threads), count)
    assert sorted(one.threads for one in specs) == shares
    assert [(one.replica, one.num_replicas) for one in specs] == [(index, count) for index in range(count)]


def test_more_replicas_than_threads_are_warned_of(caplog):
    share_machine(spec(threads=2), 2)
    assert not caplog.records
    share_machine(spec(threads=2), 3)
    assert "engine.replicas = 3, but there are only 2 threads (threads)" in caplog.text


def test_the_default_is_what_one_engine_would_take():
    specs = share_machine(spec(threads=0), 1)
    assert specs[0].threads >= 1


def test_cache_memory_of_one_machine_is_divided():
    size = share_machine(spec(threads=4, cache=CacheSpec(memory_bytes=1000)), 3)
    assert [(one.cache.memory_bytes, one.cache.memory_share) for one in size] == [(333, pytest.approx(0.4 / 3))] * 3
    share = share_machine(spec(threads=4, cache=CacheSpec(memory_share=0.6, max_blocks=7)), 2)
    assert [(one.cache.memory_bytes, one.cache.memory_share) for one in share] == [(None, 0.3)] * 2
    assert share[0].cache.max_blocks == 7, "a cap of each"


def test_gpus_are_dealt_in_turns_and_memory_is_that_of_each():
    specs = share_machine(spec(device="cuda", threads=3, cache=CacheSpec(memory_share=0.4)), 3, num_gpus=2)
    assert [one.device for one in specs] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [one.cache.memory_share for one in specs] == [0.2, 0.4, 0.2]
    assert [one.threads for one in specs] == [3, 3, 3]


def test_a_replica_of_several_ranks_gets_as_many_gpus():
    wide = spec(device="cuda", executor=executor(tensor_parallel=2, pipeline_parallel=2))
    assert [one.device for one in share_machine(wide, 3, num_gpus=8)] == ["cuda:0", "cuda:4", "cuda:0"]
    assert [one.device for one in share_machine(wide, 2, num_gpus=3)] == ["cuda", "cuda"], "the executor says why not"


def test_a_gpu_that_is_named_is_shared():
    specs = share_machine(spec(device="cuda:1"), 2, num_gpus=4)
    assert [(one.device, one.cache.memory_share) for one in specs] == [("cuda:1", 0.2)] * 2


def test_what_the_start_reports():
    assert describe_shares(share_machine(spec(threads=3), 2)) == "1 or 2 threads each, KV cache memory shared"
    assert describe_shares(share_machine(spec(threads=2), 2)) == "1 thread each, KV cache memory shared"
    assert describe_shares(share_machine(spec(device="cuda"), 2, num_gpus=2)) == "on cuda:0, cuda:1"


def test_replicas_are_processes():
    loaded = load_settings({"engine.replicas": 2, "engine.process": "inline"}, env={})
    with pytest.raises(ConfigError, match=r"needs a process for each, but engine.process = 'inline'"):
        make_replicas(spec(), loaded, VirtualClock())
