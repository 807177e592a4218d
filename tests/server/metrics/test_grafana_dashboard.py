"""The dashboard of the docs asks for nothing that `/metrics` does not have."""

from __future__ import annotations

import json
import re

import pytest

from interlace.server.metrics.names import METRICS

NAME = re.compile(r"\b(?:interlace:|process_)[a-z0-9_]+")
LABEL = re.compile(r"by \(([^)]*)\)|\{\{(\w+)\}\}|(\w+)=~")
COMMON = {"model_name", "engine", "le", "instance"}


@pytest.fixture(scope="module")
def dashboard(repo_root):
    return json.loads((repo_root / "docs" / "grafana.json").read_text("utf-8"))


def exported():
    """Sample name → the metric's own labels."""
    suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    found = {f"interlace:{one.name}{suffix}": set(one.labels) for one in METRICS for suffix in suffixes[one.kind]}
    return found | {"process_resident_memory_bytes": set()}


def targets(dashboard):
    return [target for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_rows(dashboard):
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Engine", "KV cache", "Plugins"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_every_expression_uses_exported_names_and_labels(dashboard):
    known = exported()
    assert len(targets(dashboard)) > 30
    for target in targets(dashboard):
        names = NAME.findall(target["expr"])
        assert names, target
        assert set(names) <= set(known), target["expr"]
        labels = {label for match in LABEL.findall(target["expr"] + target["legendFormat"]) for label in match}
        labels = {part.strip() for label in labels for part in label.split(",") if part.strip()}
        assert labels <= COMMON.union(*(known[name] for name in names)), target


def test_series_without_a_model_are_not_filtered_by_it(dashboard):
    anonymous = {f"interlace:{one.name}" for one in METRICS if one.anonymous}
    for target in targets(dashboard):
        if any(name.removesuffix("_total") in anonymous for name in NAME.findall(target["expr"])):
            assert "model_name" not in target["expr"], target["expr"]


def test_the_most_telling_metrics_are_shown(dashboard):
    shown = {name for target in targets(dashboard) for name in NAME.findall(target["expr"])}
    silent = {one.name for one in METRICS if not any(name.startswith(f"interlace:{one.name}") for name in shown)}
    assert silent <= {
        "cache_config_info",
        "prompt_tokens_cached",
        "prompt_tokens_cached_by_source",
        "request_inference_time_seconds",
        "request_prefill_kv_computed_tokens",
        "request_max_num_generation_tokens",
        "request_params_max_tokens",
        "request_params_n",
        "request_num_preemptions",
    }
