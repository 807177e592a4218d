"""The parts of the device runner: packed columns, graphs, the batch of a device that runs behind the host."""

from __future__ import annotations

import logging

import msgspec
import numpy as np
import pytest
import torch

from interlace.errors import CapacityError
from interlace.kv.specs import KVCacheConfig, KVGroup
from interlace.messages import Admission, BlockDelta, SampledTokens, SamplingParams, StepPlan
from interlace.sampling.device import SamplingMode
from interlace.testing.executor_driver import WorkerExecutor
from interlace.testing.fake_stream import FakeStream
from interlace.worker import device_start
from interlace.worker.device_batch import FED_BACK, DeviceBatch
from interlace.worker.device_forward import Logits
from interlace.worker.graphs import SIZES, DecodeGraphs, Ending, GraphKey, choose_sizes
from interlace.worker.step_buffers import Layout, Upload

# ── packed columns ────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_arrive_as_they_were_packed():
    layout = Layout([("a", "int64", 3), ("b", "int32", 1), ("c", "float32", 2), ("none", "int64", 0)])
    upload = Upload(FakeStream(), layout.num_bytes, 2)
    package = upload.pack(layout, {"a": np.array([1, -2]), "b": np.array([7]), "c": np.array([0.5])}, {"a": 9})
    package.send()
    columns = {name: column.tolist() for name, column in package.columns().items()}
    assert columns == {"a": [1, -2, 9], "b": [7], "c": [0.5, 0.0], "none": []}


def test_what_a_step_reads_is_not_overwritten_by_the_next():
    layout = Layout([("a", "int64", 2)])
    upload = Upload(FakeStream(), layout.num_bytes, 3)
    packages = [upload.pack(layout, {"a": np.array([step, step])}) for step in range(3)]
    for step, package in enumerate(packages):
        package.send()
        assert package.columns()["a"].tolist() == [step, step]


def test_a_buffer_that_grows_leaves_the_old_one_alone():
    upload = Upload(FakeStream(), 16, 2, grows=True)
    small, large = Layout([("a", "int64", 2)]), Layout([("a", "int64", 100)])
    first = upload.pack(small, {"a": np.array([1, 2])})
    second = upload.pack(large, {"a": np.arange(100)})
    first.send()
    second.send()
    assert first.columns()["a"].tolist() == [1, 2]
    assert second.columns()["a"].tolist() == list(range(100))


# ── graphs ────────────────────────────────────────────────────────────────────────────────────────────────────


def make_graphs(stream, sizes=(), max_rows=20, max_model_len=10_000):
    return DecodeGraphs(stream, sizes, max_rows, max_model_len, lambda key: lambda: None, float)


@pytest.mark.parametrize(
    ("sizes", "max_rows", "expected"),
    [
        ((), 20, (1, 2, 4, 8, 16, 20)),
        ((), 1, (1,)),
        ((), 512, SIZES),
        ((), 1000, SIZES),
        ((4, 2, 4, 99), 50, (2, 4)),
        ((99,), 50, ()),
    ],
)
def test_sizes(sizes, max_rows, expected):
    assert choose_sizes(sizes, max_rows) == expected


def test_a_step_takes_the_next_size_and_length():
    graphs = make_graphs(FakeStream())
    ending, logits = Ending(SamplingMode.GREEDY), Ending(None)
    assert graphs.key(3, 100, ending) == GraphKey(4, 2048, ending)
    assert graphs.key(4, 2048, ending) == GraphKey(4, 2048, ending)
    assert graphs.key(17, 2049, logits) == GraphKey(20, 8192, logits)
    assert graphs.key(1, 9000, ending) == GraphKey(1, 10_000, ending), "not beyond max_model_len"
    assert graphs.key(21, 10, ending) is None, "no graph is that large"
    assert make_graphs(FakeStream(), max_model_len=96).key(1, 5, ending) == GraphKey(1, 96, ending)


def test_graphs_are_captured_once(caplog):
    graphs = make_graphs(stream := FakeStream())
    key = graphs.key(3, 100, Ending(SamplingMode.RANDOM))
    with caplog.at_level(logging.INFO, "interlace.worker"):
        assert graphs.find(key) is graphs.find(key) is not None
    assert stream.num_captured == len(graphs) == 1
    assert "captured the decode graph for 4 rows up to 2048 tokens (sampling random)" in caplog.text
    assert str(Ending(SamplingMode.RANDOM, True)) == "sampling random, log probabilities"


def test_a_graph_that_cannot_be_captured_ends_them_all(caplog):
    graphs = make_graphs(FakeStream(max_captures=1))
    first, second = (graphs.key(rows, 10, Ending(None)) for rows in (1, 2))
    assert graphs.find(first) is not None
    assert graphs.find(second) is None and graphs.find(first) is None and graphs.key(1, 10, Ending(None)) is None
    assert caplog.text.count("decode steps run without device graphs") == 1


# ── the batch ─────────────────────────────────────────────────────────────────────────────────────────────────


def make_batch():
    kv = KVCacheConfig(
        block_size=4,
        num_blocks=20,
        groups=(KVGroup("full", 0, (0,)), KVGroup("window", 6, (1,))),
        bytes_per_block=1,
    )
    return DeviceBatch(max_num_seqs=3, max_model_len=16, kv=kv)


def admission(slot, tokens, cached=0, prompt=None, **params):
    return Admission(
        slot=slot,
        generation=1,
        token_ids=tokens,
        num_prompt_tokens=prompt or len(tokens),
        num_cached_tokens=cached,
        params=SamplingParams(**params),
        seed=2**64 - 5,
        sample_index=2,
        stop_token_ids=(),
    )


def plan(slots, num_tokens, sample, blocks=()):
    empty = [BlockDelta([], [], []), BlockDelta([], [], [])]
    return StepPlan(step_id=3, slots=slots, num_tokens=num_tokens, sample=sample, blocks=list(blocks) or empty)


def test_tokens_that_only_the_device_knows_are_fed_back():
    batch = make_batch()
    batch.admit(admission(2, [10, 11, 12, 13, 14], temperature=0.5, top_p=0.9), 3)
    batch.admit(admission(0, [20, 21], cached=1, temperature=0.0), 3)
    first = plan([2, 0], [5, 1], [True, True], [BlockDelta([2, 0], [2, 1], [5, 6, 7]), BlockDelta([0], [1], [9])])
    batch.append_blocks(first)
    news = {name: values.tolist() for name, values in batch.take_news().items()}
    assert news == {"index.0": [8, 9, 0], "block.0": [5, 6, 7], "index.1": [0], "block.1": [9]}
    assert batch.take_news() == {}
    inputs = batch.flatten(first)
    assert inputs.token_ids.tolist() == [10, 11, 12, 13, 14, 21]
    assert inputs.positions.tolist() == [0, 1, 2, 3, 4, 1]
    assert inputs.slot_mappings[0].tolist() == [20, 21, 22, 23, 24, 29]
    assert (inputs.outputs.tolist(), inputs.is_decode, inputs.longest) == ([4, 5], False, 5)
    columns = {name: values.tolist() for name, values in batch.sampling_columns(inputs).items()}
    assert columns["position"] == [0, 0] and columns["seed"] == [-5, -5] and columns["sample_index"] == [2, 2]
    assert batch.sampling_mode(inputs) is SamplingMode.TRUNCATED
    batch.advance(first)
    second = batch.flatten(plan([0, 2], [1, 1], [True, True]))
    assert second.token_ids.tolist() == [FED_BACK, FED_BACK] and second.is_decode
    assert batch.sampling_columns(second)["position"].tolist() == [1, 1]
    batch.hear(SampledTokens(3, [2, 0], [77, 78]))
    assert batch.flatten(plan([0, 2], [1, 1], [True, True])).token_ids.tolist() == [78, 77]
    assert batch.sampling_mode(batch.flatten(plan([0], [1], [True]))) is SamplingMode.GREEDY


def test_a_decode_row_that_does_not_sample_is_no_decode_step():
    batch = make_batch()
    batch.admit(admission(1, [1, 2, 3]), 0)
    inputs = batch.flatten(plan([1], [1], [False]))
    assert not inputs.is_decode and inputs.outputs.tolist() == [] and inputs.out_slots.tolist() == []


# ── starting ──────────────────────────────────────────────────────────────────────────────────────────────────


def selections(driver):
    return {selection.kind: selection for selection in driver.info.selections}


def test_the_start_says_how_steps_run(tiny_spec, drive):
    driver = drive(tiny_spec(), stream := FakeStream())
    step = selections(driver)["step"]
    assert (step.name, step.reason) == (
        "device graphs",
        "2 steps in flight; decoding of up to 1, 2, 4, 6 rows, captured when needed",
    )
    assert stream.num_captured == 1, "the largest is captured at once"
    assert driver.info.timings["graphs"] > 0


def test_the_start_measures_what_decoding_takes_at_the_longest_sequence(tiny_spec, drive, monkeypatch):
    """Partial sums of split keys are as large as the longest sequence of a step demands, for each of its rows."""
    seen = []
    run_step = device_start._run_step

    def note(*given):
        seen.append(given[5:8])
        run_step(*given)

    monkeypatch.setattr(device_start, "_run_step", note)
    drive(tiny_spec(**{"gpu.graphs": False}), FakeStream())
    assert seen == [([24], 0, 6), ([1] * 6, 95, 6)]


@pytest.mark.parametrize(
    ("spec", "stream", "reason"),
    [
        ({"graphs": False}, FakeStream(), "2 steps in flight; no device graphs: TorchAttention: it does not support"),
        ({"gpu.graphs": False}, FakeStream(), "2 steps in flight; no device graphs: gpu.graphs = false"),
        ({"gpu.steps_in_flight": 1}, FakeStream(max_captures=0), "one step at a time; no device graphs: RuntimeError"),
    ],
)
def test_the_start_says_why_there_are_no_graphs(tiny_spec, drive, spec, stream, reason):
    found = selections(drive(tiny_spec(**spec), stream))["step"]
    assert found.name == "kernel by kernel" and found.reason.startswith(reason)


def test_graphs_of_the_asked_sizes_serve_what_fits(tiny_spec, drive):
    """Steps of more rows than the largest graph run kernel by kernel, and all give the same tokens."""
    spec = tiny_spec(**{"gpu.graph_sizes": [2]})
    tokens = []
    for runs_on in (stream := FakeStream(), WorkerExecutor()):
        driver = drive(spec, runs_on)
        names = [driver.add([number, 5], temperature=0.0, max_tokens=4 * (number + 1)) for number in range(4)]
        driver.run()
        tokens.append([driver.tokens[name] for name in names])
    assert tokens[0] == tokens[1]
    assert stream.num_captured == 1 and stream.num_replayed > 0


def test_the_cache_gets_what_the_largest_step_leaves(tiny_spec, drive):
    """Measured, not guessed; what does not fit is an error that says so."""
    spec = tiny_spec(**{"cache.max_blocks": 10**6, "cache.memory": "auto"})
    wide = msgspec.structs.replace(spec, max_model_len=96)
    plenty = drive(wide, FakeStream(peak=0))
    assert selections(plenty)["cache"].reason.endswith("measured: 0 B for the largest step, 0 B to decode")
    with pytest.raises(CapacityError, match=r"nothing is left for the KV cache: .* largest step takes"):
        drive(wide, FakeStream(peak=1 << 60))
    exact = tiny_spec(**{"cache.max_blocks": 10**6, "cache.memory": "64KiB"})
    assert drive(exact, FakeStream(peak=1 << 20)).info.kv.num_blocks == (64 << 10) // plenty.info.kv.bytes_per_block


def test_a_step_that_does_not_fit_says_what_to_lower(tiny_spec, drive, monkeypatch):
    def no_memory(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(device_start, "_run_step", no_memory)
    wanted = (
        r"a step of 24 tokens does not fit .* Tried to allocate 2.00 GiB.; lower .*tokens \(now 24\) or .*\(now 6\)"
    )
    with pytest.raises(CapacityError, match=wanted):
        drive(tiny_spec(), FakeStream())


def test_inference_mode_reaches_the_device(tiny_spec, drive):
    """Work that the fake device runs late runs as it would have at once."""
    driver = drive(tiny_spec(graphs=False), FakeStream())
    model = driver.executor._worker._runner._model
    forward, modes = model.forward, []
    model.forward = lambda *given: modes.append(torch.is_inference_mode_enabled()) or forward(*given)
    driver.add([1, 2], temperature=0.0, max_tokens=3)
    driver.run()
    assert len(modes) >= 3 and all(modes)


def test_graphs_that_end_with_logits_leave_them_in_one_place(tiny_spec, drive):
    """A replay runs no Python, so where they are follows from the graph that is replayed, not from the last captured;
    and what each kept for itself would be memory that no other graph can use."""
    driver = drive(tiny_spec(), FakeStream())
    runner = driver.executor._worker._runner
    keys = [runner.graphs.key(rows, 10, Ending(None)) for rows in (1, 4)]
    with torch.inference_mode():
        assert all(runner.graphs.find(key) is not None for key in keys)
        driver.add([1, 2], temperature=0.0, max_tokens=9)
        driver.step()
        inputs = runner._device_batch.flatten(plan([0], [1], [True], [BlockDelta([], [], [])]))
        sampling = runner._device_batch.sampling_columns(inputs)
        for key in (*keys, keys[0]):
            out = Logits()
            runner._forward.decode(inputs, sampling, key, lambda: None, out)()
            assert out.logits.shape == (key.rows, 300)
            assert out.logits.data_ptr() == runner._forward._graph_logits.data_ptr()


def test_graphs_read_block_tables_of_their_own_step(tiny_spec, drive):
    """They share the place for them, and there is room for the widest."""
    driver = drive(tiny_spec(), FakeStream())
    runner = driver.executor._worker._runner
    (room,) = runner._forward._graph_tables
    assert room.numel() == 7 * 12, "six slots and the padding's, 96 tokens in blocks of 8"
