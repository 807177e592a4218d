"""Tuned figures: found, kept, read again, and ignored where they are no use. No GPU is measured here."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from interlace.plugins.triton import runtime, tuning, tuning_cases
from interlace.plugins.triton.attention_config import KernelConfig, LayerShape, default_decode, default_prefill, fitted
from interlace.plugins.triton.tuning import TuningStore, choose_configs
from interlace.plugins.triton.tuning_cases import pick_fastest

SHAPE = LayerShape(8, 4, 128, 64, 2, False, 0, False)
FIGURES = KernelConfig(16, 32, 2, 3)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(runtime, "shared_memory", lambda device: runtime.MAX_SHARED_MEMORY)


def test_the_fastest_that_runs_wins():
    times = {FIGURES: 2.0, FIGURES._replace(warps=4): 1.0, FIGURES._replace(warps=8): RuntimeError("out of resource")}

    def measure(config):
        if isinstance(times[config], Exception):
            raise times[config]
        return times[config]

    assert pick_fastest(times, measure).warps == 4


def test_all_failing_is_an_error():
    def measure(config):
        raise RuntimeError("out of resource")

    with pytest.raises(RuntimeError, match="out of resource"):
        pick_fastest([FIGURES], measure)


def test_what_is_kept_is_read(tmp_path):
    one, two = TuningStore(tmp_path / "new", "H200"), TuningStore(tmp_path / "new", "H200")
    one.put("a", FIGURES)
    two.put("b", FIGURES._replace(tile=64))
    assert one.get("a") == FIGURES and one.get("b").tile == 64
    assert one.get("c") is None and TuningStore(tmp_path / "new", "A100").get("a") is None


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [1],
        {"rows": 16},
        {"rows": 16, "tile": 48, "warps": 4, "stages": 2},
        {"rows": 16, "tile": 256, "warps": 4, "stages": 2},
        {"rows": 16, "tile": 64, "warps": "4", "stages": 2},
        {"rows": 16, "tile": 64, "warps": 4, "stages": 0},
        {"rows": 8, "tile": 64, "warps": 4, "stages": 2},
        {"rows": 16, "tile": 64, "warps": 4, "stages": 2, "more": 1},
    ],
)
def test_edited_figures_are_ignored(entry, tmp_path):
    (tmp_path / "attention-H200.json").write_text(json.dumps({"a": entry}))
    assert TuningStore(tmp_path, "H200").get("a") is None


def test_a_broken_file_is_a_warning(tmp_path, caplog):
    (tmp_path / "attention-H200.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert TuningStore(tmp_path, "H200").get("a") is None
    assert "attention-H200.json" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        TuningStore(tmp_path / "file", "H200").put("a", FIGURES)
    assert "tuning_dir" in caplog.text


def test_the_first_start_measures_nothing(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_cases, "find_best", None)
    found = choose_configs(SHAPE, "bfloat16", "cuda:0", str(tmp_path), False)
    assert found == (default_decode(SHAPE), default_prefill(SHAPE))
    assert not list(tmp_path.iterdir())


def test_tuning_is_done_once(gpu, tmp_path, monkeypatch):
    asked = []

    def find_best(kind, shape, dtype, device, candidates):
        asked.append(kind)
        return pick_fastest(candidates, lambda config: config.tile + config.stages + config.warps)

    monkeypatch.setattr(tuning_cases, "find_best", find_best)
    first = choose_configs(SHAPE, "bfloat16", "cuda:0", str(tmp_path), True)
    again = choose_configs(SHAPE, "bfloat16", "cuda:0", str(tmp_path), False)
    assert first == again != (default_decode(SHAPE), default_prefill(SHAPE))
    assert asked == ["decode", "prefill"]
    assert choose_configs(SHAPE, "float16", "cuda:0", str(tmp_path), False)[0] == default_decode(SHAPE)


@pytest.mark.parametrize("kilobytes", [227, 163, 99, 64])
def test_defaults_shrink_to_the_device(kilobytes):
    for shape in (SHAPE, SHAPE._replace(head_size=256), SHAPE._replace(group=8, is_fp8=True)):
        for default in (default_decode(shape), default_prefill(shape)):
            found = fitted(default, shape, kilobytes << 10)
            assert tuning._is_sound(found._asdict()) and found.rows >= shape.group
            assert found == default or kilobytes < 227
            assert found.stages >= 2 and 2 * 2 * found.tile * shape.block_d < kilobytes << 10


def test_candidates_are_sound():
    for shape in (SHAPE, SHAPE._replace(head_size=256), SHAPE._replace(group=64), SHAPE._replace(is_fp8=True)):
        candidates = [*tuning.decode_candidates(shape), *tuning.prefill_candidates(shape)]
        assert candidates
        for config in candidates:
            assert tuning._is_sound(config._asdict()), config
