"""Workers that are ranks: numbering, sampled tokens on their way, agreement on KV blocks, and what they say."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import torch

from interlace.config import load_settings
from interlace.errors import ConfigError
from interlace.interfaces.model import Parallel
from interlace.kv.specs import KVCacheConfig, KVGroup
from interlace.messages import Admission, SampledTokens, SamplingParams, StepPlan, StepResult
from interlace.plugin_manager import PluginManager
from interlace.plugins.models.llama import LlamaForCausalLM
from interlace.resolve import resolve
from interlace.testing.executor_driver import Driver, WorkerExecutor
from interlace.testing.ranks import ThreadedParallel, ThreadedRanks
from interlace.worker.feedback import Feedback
from interlace.worker.persistent_batch import PersistentBatch
from interlace.worker.place import Place
from interlace.worker.sizing import check_pipeline, plan_kernels, plan_weights
from interlace.worker.worker import Worker

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 144,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,  # with three KV heads, as in SmolLM2
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = {
        "model": str(tmp_path),
        "checkpoint.use": "dummy",
        "dtype": "float32",
        "threads": 1,
        "max_model_len": 96,
        "cache.block_size": 16,
        "cache.memory": "1MiB",
        "scheduler.max_num_seqs": 4,
        "scheduler.max_num_batched_tokens": 24,
    }
    loaded = load_settings(given, env={})
    return resolve(loaded, PluginManager(loaded.settings))


def ranks(tensor_parallel=1, pipeline_parallel=1):
    options = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    return ThreadedRanks(ThreadedRanks.Options(**options))


# ── Places ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_places_are_numbered_stage_by_stage():
    places = [Place.of(rank, 2, 3) for rank in range(6)]
    assert [place.rank for place in places] == list(range(6))
    assert {place.world for place in places} == {6}
    assert [(place.stage, place.tensor_rank) for place in places[:3]] == [(0, 0), (0, 1), (1, 0)]
    assert [place.rank for place in places if place.is_first_stage] == [0, 1]
    assert [place.rank for place in places if place.is_last_stage] == [4, 5]
    assert [place.rank for place in places if place.samples] == [4]
    assert Place() == Place.of(0, 1, 1) and Place().samples


@pytest.mark.parametrize(("layers", "stages"), [(30, 1), (30, 4), (7, 3), (3, 3), (5, 2)])
def test_every_layer_is_on_one_stage(layers, stages):
    held = []
    for stage in range(stages):
        parallel = Parallel()
        parallel.stage, parallel.num_stages = stage, stages
        held.append(parallel.layers_here(layers))
    assert [layer for here in held for layer in here] == list(range(layers))
    assert [len(here) for here in held] == sorted(map(len, held), reverse=True)
    assert len(held[0]) - len(held[-1]) <= 1


def test_one_rank_alone_exchanges_nothing():
    x = torch.ones(2, 3)
    assert Parallel().all_reduce(x) is x and Parallel().all_gather(x) is x
    with pytest.raises(RuntimeError, match="no next pipeline stage"):
        Parallel().send(x, x)
    with pytest.raises(RuntimeError, match="no previous pipeline stage"):
        Parallel().receive(2, 3, torch.float32)


# ── Sampled tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


def plan(step_id, slots):
    return StepPlan(step_id=step_id, slots=slots, num_tokens=[1] * len(slots), sample=[True] * len(slots))


def result(step_id, counts, token_ids):
    return StepResult(step_id=step_id, counts=counts, token_ids=token_ids, duration=0.0)


def test_feedback_is_handed_out_once_in_order():
    feedback = Feedback()
    feedback.record(plan(3, [5, 1, 2]), result(3, [1, 0, 2], [10, 11, 12]))
    feedback.record(plan(4, [1]), result(4, [0], []))
    feedback.record(plan(5, [1]), result(5, [1], [13]))
    assert feedback.take() == [SampledTokens(3, [5, 2, 2], [10, 11, 12]), SampledTokens(5, [1], [13])]
    assert feedback.take() == []


def known_tokens(batch, slot):
    return batch.token_ids[slot, : batch.num_tokens[slot]].tolist()


def test_tokens_of_a_slot_that_changed_hands_are_dropped():
    kv = KVCacheConfig(block_size=4, num_blocks=8, groups=(KVGroup("full", 0, (0,)),), bytes_per_block=1)
    batch = PersistentBatch(4, 32, kv, torch.device("cpu"))

    def admit(slot, tokens, step_id):
        batch.admit(Admission(slot, 1, tokens, len(tokens), 0, SamplingParams(), 0, 0, ()), step_id)

    admit(0, [1, 2], 0)
    admit(1, [3], 0)
    admit(2, [4], 0)
    batch.hear(SampledTokens(0, [0, 1], [7, 8]))
    admit(1, [9, 9], 2)  # step 1 had sampled for the request that held slot 1 before
    batch.hear(SampledTokens(1, [0, 1, 2], [70, 80, 90]))
    batch.hear(SampledTokens(2, [1, 2, 2], [81, 91, 92]))
    assert [known_tokens(batch, slot) for slot in range(3)] == [[1, 2, 7, 70], [9, 9, 81], [4, 90, 91, 92]]
    assert np.array_equal(batch.num_computed[:3], [0, 0, 0])


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (1, 3)])
def test_aborts_in_mid_step_confuse_no_rank(layout, spec):
    """Whoever takes the slot of an aborted request has nothing of what was still being sampled for it."""
    prompts = [[number, 5, 6 + number, 7] for number in range(12)]
    expected = []
    for prompt in prompts:
        expected.append(run(WorkerExecutor(), spec, [prompt])[0])
    executor = ranks(*layout)
    try:
        driver = Driver(executor, spec, 60.0)
        names = [driver.add(prompt, temperature=0.0, max_tokens=12, ignore_eos=True) for prompt in prompts]
        aborted = []
        for step in range(400):
            driver.submit_all()
            running = list(driver.core.queues.running)
            if step % 5 == 2 and len(aborted) < 5:
                victim = next(state.id for state in running if state.in_flight)
                driver.core.abort([victim], 0.0)
                aborted.append(victim)
            if not driver.step():
                break
        assert len(aborted) == 5
        for name, tokens in zip(names, expected, strict=True):
            got = driver.tokens[name]
            assert got == tokens[: len(got)] and (name in aborted or len(got) == 12)
    finally:
        executor.shutdown()


def run(executor, spec, prompts):
    try:
        driver = Driver(executor, spec, 60.0)
        names = [driver.add(prompt, temperature=0.0, max_tokens=12, ignore_eos=True) for prompt in prompts]
        driver.run()
        return [driver.tokens[name] for name in names]
    finally:
        executor.shutdown()


# ── Agreement ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_find_their_own_number_of_blocks_and_start_with_the_least(spec):
    """Of nine query and three KV heads, two ranks hold six with two and three with one."""
    places = ThreadedParallel.make(2)
    workers = [Worker(spec, lambda event: None, place=rank.place, parallel=rank) for rank in places]
    found = [worker.prepare() for worker in workers]
    per_block = [3 * 2 * 16 * heads * 16 * 4 for heads in (2, 1)]  # layers, keys and values, tokens, heads, size, bytes
    most = 1 + 4 * 6  # seats, each of 96 tokens
    assert found == [min(most, 2**20 // nbytes) for nbytes in per_block]
    infos = [worker.start(num_blocks=7) for worker in workers]
    assert [info.kv.num_blocks for info in infos] == [7, 7]
    assert [info.kv.bytes_per_block for info in infos] == per_block
    assert {info.kv.groups for info in infos} == {(KVGroup("full", 0, (0, 1, 2)),)}


def test_ranks_that_share_memory_count_on_their_part(spec, monkeypatch):
    cache = msgspec.structs.replace(spec.cache, memory_bytes=None, memory_share=1.0)
    spec = msgspec.structs.replace(spec, cache=cache)
    model = spec.architecture.load()
    weights, _ = plan_weights(model, spec, plan_kernels(spec)[0], spec.open_checkpoint())
    nbytes = 3 * 2 * 16 * 3 * 16 * 4  # layers, keys and values, tokens, heads, size, bytes
    free = 2 * (weights + 10 * nbytes)
    monkeypatch.setattr("interlace.worker.worker.free_memory", lambda device: free)
    blocks = [
        Worker(spec, lambda event: None, place=msgspec.structs.replace(Place(), sharers=sharers)).prepare()
        for sharers in (1, 2)
    ]
    assert blocks == [25, 10], "as many as could be used; what fits half the memory"


@pytest.mark.parametrize(("layout", "in_flight"), [((1, 1), 1), ((2, 1), 1), ((1, 3), 3), ((2, 2), 2)])
def test_what_a_worker_says_of_its_ranks(spec, layout, in_flight):
    executor = ranks(*layout)
    try:
        info = executor.start(spec, lambda event: None)
    finally:
        executor.shutdown()
    assert (info.max_in_flight, info.num_stages) == (in_flight, layout[1])
    assert info.feeds_tokens == (layout == (1, 1))
    (step,) = [choice for choice in info.selections if choice.kind == "step"]
    assert (step.name == "program") == (layout == (1, 1)), step


def test_a_model_that_cannot_be_cut_says_so(spec):
    class Whole(LlamaForCausalLM):
        supports_pipeline = False

    parallel = Parallel()
    parallel.num_stages = 2
    check_pipeline(spec, LlamaForCausalLM, parallel)
    message = r"executor option pipeline_parallel = 2, but the model LlamaForCausalLM cannot be cut into stages"
    with pytest.raises(ConfigError, match=message):
        check_pipeline(spec, Whole, parallel)
