"""Where ranks are and what they may use: options, devices, processors."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from pydantic import ValidationError

from interlace.config import load_settings
from interlace.engine.llm import LLM
from interlace.engine.sharing import share_machine
from interlace.errors import ConfigError
from interlace.model_config import ModelConfig
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.ranks.cores import deal_cores, parse_cores
from interlace.plugins.executors.ranks.options import RankOptions
from interlace.testing.executor import scripted_spec
from interlace.testing.executor_suite import SETTINGS, ExecutorConformance


def places(device="cpu", threads=8, **options):
    spec = msgspec.structs.replace(scripted_spec("none:None"), device=device, threads=threads)
    return RankOptions(**options).places(spec)


def test_one_rank_has_everything():
    (place,) = places()
    assert (place.rank, place.world, place.samples, place.threads, place.sharers) == (0, 1, True, 8, 1)


def test_ranks_go_stage_by_stage_and_share_the_threads():
    found = places(tensor_parallel=2, pipeline_parallel=3)
    assert [(place.stage, place.tensor_rank, place.rank) for place in found] == [
        (0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3), (2, 0, 4), (2, 1, 5)
    ]  # fmt: skip
    assert [place.samples for place in found] == [False, False, False, False, True, False]
    assert {(place.threads, place.sharers, place.device) for place in found} == {(1, 6, "cpu")}
    assert {place.threads for place in places(tensor_parallel=2, threads_per_rank=5)} == {5}


def test_stages_take_about_as_long_unless_told_otherwise():
    config = ModelConfig(
        architecture="Any",
        vocab_size=1000,
        hidden_size=10,
        intermediate_size=80,
        num_layers=20,
        num_heads=2,
        num_kv_heads=2,
        head_size=5,
        norm_eps=1e-6,
        max_position_embeddings=100,
    )  # a layer of 2,800 parameters, a head of 10,000
    spec = msgspec.structs.replace(scripted_spec("none:None"), model_config=config, threads=4)

    def layers(**options):
        places = RankOptions(**options).places(spec)
        on_a_node = RayOptions(**options).place(spec, 1, 0, 1)
        (found,) = {place.stage_layers for place in (*places, on_a_node)}
        return found

    assert layers(pipeline_parallel=2, tensor_parallel=2) == (12, 8)
    assert layers(pipeline_parallel=2, pipeline_layers=[15, 5]) == (15, 5)
    assert layers(tensor_parallel=2) == ()
    with pytest.raises(ConfigError, match="pipeline_layers has 1 entries"):
        RankOptions(pipeline_parallel=2, pipeline_layers=[5]).places(spec)
    with pytest.raises(ConfigError, match="pipeline_layers has 1 entries"):
        RayOptions(pipeline_parallel=2, pipeline_layers=[5]).check(spec)


def test_devices():
    assert [place.device for place in places("cuda", tensor_parallel=2)] == ["cuda:0", "cuda:1"]
    assert [place.device for place in places("cuda:2", pipeline_parallel=2)] == ["cuda:2", "cuda:3"]
    named = places("cuda", tensor_parallel=3, devices=["cuda:5", "cuda:5", "cuda:1"])
    assert [(place.device, place.sharers) for place in named] == [("cuda:5", 2), ("cuda:5", 2), ("cuda:1", 1)]
    with pytest.raises(ConfigError, match=r"devices has 1 entries for 2 ranks \(tensor_parallel = 2 x"):
        places(tensor_parallel=2, devices=["cpu"])


def test_shared_memory_is_for_the_cpu():
    assert RankOptions().shares_memory(places())
    assert not RankOptions(all_reduce="gloo").shares_memory(places())
    assert not RankOptions().shares_memory(places("cuda"))
    with pytest.raises(ConfigError, match="all_reduce = 'shared_memory' is for ranks on the CPU"):
        RankOptions(all_reduce="shared_memory").shares_memory(places("cuda"))


@pytest.mark.parametrize(
    "wrong", [{"tensor_parallel": 0}, {"all_reduce": "mpi"}, {"cores": 4}, {"start_timeout_s": 0}, {"ranks": 2}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        RankOptions(**wrong)


def test_lists_of_processors():
    allowed = set(range(12))
    assert parse_cores("0-3,8", allowed) == (0, 1, 2, 3, 8)
    assert parse_cores(" 5 , 2-2", allowed) == (2, 5)
    for wrong in ("", "a", "3-1", "1-", "-1", "1;2"):
        with pytest.raises(ConfigError, match="is no list of processors; write it like `0-3,8`"):
            parse_cores(wrong, allowed)
    with pytest.raises(ConfigError, match=r"names processor 12, which this process may not use; allowed are 0, 1,"):
        parse_cores("10-13", allowed)


def test_cores_are_dealt_whole(tmp_path):
    """Eight processors, two to a core, numbered as is common: 0 and 4 are one core."""
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    assert deal_cores(2, set(range(8)), tmp_path) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert deal_cores(3, set(range(8)), tmp_path) == [(0, 4), (1, 5), (2, 3, 6, 7)]
    assert deal_cores(1, {1, 5, 2}, tmp_path) == [(1, 2, 5)]
    with pytest.raises(ConfigError, match="needs a core for each of 3 ranks; this process may use 2"):
        deal_cores(3, {1, 5, 2}, tmp_path)


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(deal_cores, "__defaults__", (None, Path("/nowhere")))


def of_each_replica(count, **options):
    """What each of so many replicas on one machine binds its ranks to."""
    spec = msgspec.structs.replace(scripted_spec("none:None"), device="cpu", threads=8)
    return [
        [(place.cores, place.threads) for place in RankOptions(**options).places(one)]
        for one in share_machine(spec, count)
    ]


def test_replicas_on_one_machine_share_its_cores(eight_cores):
    assert of_each_replica(2, cores="auto", tensor_parallel=2) == [
        [((0, 1), 2), ((2, 3), 2)],
        [((4, 5), 2), ((6, 7), 2)],
    ]
    assert of_each_replica(3, cores="auto") == [[((0, 1), 2)], [((2, 3, 4), 3)], [((5, 6, 7), 3)]]
    assert of_each_replica(2, cores=["0-1", "2-3", "4", "6"], pipeline_parallel=2) == [
        [((0, 1), 2), ((2, 3), 2)],
        [((4,), 1), ((6,), 1)],
    ]
    assert of_each_replica(2, tensor_parallel=2) == [[((), 2), ((), 2)]] * 2, "not bound"
    with pytest.raises(
        ConfigError, match=r"a core for each of 9 ranks \(of engine.replicas = 3\); this process may use 8"
    ):
        of_each_replica(3, cores="auto", tensor_parallel=3)
    with pytest.raises(ConfigError, match=r"cores has 2 entries for 4 ranks .* x engine.replicas = 2\)"):
        of_each_replica(2, cores=["0-3", "4-7"], tensor_parallel=2)


def test_replicas_of_ray_are_not_bound(eight_cores):
    spec = msgspec.structs.replace(scripted_spec("none:None"), num_replicas=2)
    with pytest.raises(ConfigError, match=r"cores with engine\.replicas = 2: ranks of several"):
        RayOptions(cores="auto").check(spec)
    RayOptions(cores="auto").check(msgspec.structs.replace(spec, num_replicas=1))


def test_one_word_is_a_list_of_one():
    assert RankOptions(cores="auto").cores == ["auto"]
    assert RankOptions(cores=["0-3", "4-7"]).cores == ["0-3", "4-7"]


def test_bound_ranks_take_their_processors_threads():
    mine = sorted(os.sched_getaffinity(0))
    (place,) = places(cores=[str(mine[0])], threads=0)
    assert (place.cores, place.threads) == ((mine[0],), 0), "as many threads as the worker finds for its processors"
    (place,) = places(cores=[str(mine[0])], threads=8)
    assert place.threads == 1, "no more than it has cores"
    (place,) = places(cores=[str(mine[0])], threads=8, threads_per_rank=3)
    assert place.threads == 3, "unless told so"
    with pytest.raises(ConfigError, match="cores has 1 entries for 2 ranks"):
        places(tensor_parallel=2, cores=["0"])


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_ranks_of_replicas_are_bound_apart(tmp_path):
    """Of real engines, as their processes are bound."""
    suite = type("Suite", (ExecutorConformance,), {"executor": "multiprocess"})
    suite().spec(tmp_path)  # writes the tiny model
    given = {"executor.use": "multiprocess", "executor.options.multiprocess.cores": "auto", "engine.replicas": 2}
    with LLM.from_loaded(load_settings({"model": str(tmp_path), **SETTINGS, **given}, env={})) as llm:
        first, second = (os.sched_getaffinity(ranks[0]["pid"]) for ranks in llm.front.control("ranks"))
    assert first and second and not first & second
    assert first | second == os.sched_getaffinity(0)
