"""`ray` without a cluster: what it accepts, what it needs, and what it costs those who do not use it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from interlace.errors import ConfigError
from interlace.plugin_manager import PluginManager
from interlace.plugins.executors import ray as ray_module
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.cluster.tcp import Listener, answers, connect, read_all
from interlace.plugins.executors.multiprocess import MultiprocessExecutor
from interlace.plugins.executors.ray import RayExecutor
from interlace.testing import ExecutorConformance

LISTING = """
import builtins, sys
real = builtins.__import__
def without_ray(name, *rest):
    if name.partition(".")[0] == "ray":
        raise ModuleNotFoundError(name)
    return real(name, *rest)
builtins.__import__ = without_ray
from interlace.plugin_manager import PluginManager
target = PluginManager().registry("executors").get("ray").load()
target.Options(tensor_parallel=2)
print(sorted({"torch", "ray"} & set(sys.modules)))
"""


@pytest.fixture
def spec(tmp_path):
    suite = type("Suite", (ExecutorConformance,), {"executor": "ray"})
    suite.setup_class()
    return suite().spec(tmp_path)


def test_it_is_listed_and_loaded_without_ray():
    done = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_choosing_it_without_ray_names_the_extra(spec, monkeypatch):
    monkeypatch.setattr(ray_module, "find_spec", lambda name: None)
    executor = RayExecutor(RayOptions())
    with pytest.raises(ConfigError, match=r"executor\.use is 'ray'.*pip install 'interlace\[ray\]'"):
        executor.start(spec, lambda event: None)
    executor.shutdown()


def test_every_option_of_multiprocess_is_one_of_ray():
    """So that nothing but the name of the executor changes."""
    ours, theirs = RayExecutor.Options.model_fields, MultiprocessExecutor.Options.model_fields
    assert set(theirs) < set(ours)
    for name, field in theirs.items():
        assert (ours[name].annotation, ours[name].default) == (field.annotation, field.default)
    assert PluginManager().registry("executors").get("ray").provider.summary


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"address": "ray://head:10001"}, "a Ray Client address does not do"),
        ({"all_reduce": "shared_memory"}, "is for ranks on one machine"),
        ({"tensor_parallel": 2, "devices": ["cpu"]}, "devices has 1 entries for 2 ranks"),
        ({"tensor_parallel": 2, "devices": ["cpu", "cuda:0"]}, "names cpu and cuda"),
        ({"pipeline_parallel": 3, "cores": ["0"]}, "cores has 1 entries for 3 ranks"),
    ],
)
def test_options_that_cannot_be(spec, options, text):
    with pytest.raises(ConfigError, match=text):
        RayOptions(**options).check(spec)


def test_what_ray_is_asked_for(spec):
    assert RayOptions().resources(spec) == {"CPU": 1.0}
    assert RayOptions(threads_per_rank=3).resources(spec) == {"CPU": 3.0}
    on_gpus = RayOptions(tensor_parallel=2, devices=["cuda:4", "cuda:7"])
    assert on_gpus.resources(spec) == {"CPU": 1.0, "GPU": 1.0}
    place = on_gpus.place(spec, rank=1, index=1, count=2)
    assert (place.device, place.sharers) == ("cuda:0", 1), "Ray shows a rank no GPU but its own"


def test_ranks_of_a_node_share_it(spec):
    options = RayOptions(tensor_parallel=2, pipeline_parallel=2)
    place = options.place(spec, rank=3, index=1, count=2)
    assert (place.stage, place.tensor_rank, place.rank, place.sharers) == (1, 1, 3, 2)
    assert place.threads == max(1, options.place(spec, rank=0, index=0, count=1).threads // 2)


def test_a_rank_lets_in_only_who_knows_the_key():
    from interlace.plugins.executors.cluster.messages import Seat

    listener = Listener("127.0.0.1")
    seat = Seat(host="127.0.0.1", port=listener.port, key=listener.key, pid=1, node_id="")
    assert answers("127.0.0.1", listener.port)
    stranger = connect(Seat(host="127.0.0.1", port=listener.port, key=b"x" * 32, pid=1, node_id=""), 5.0)
    friend = connect(seat, 5.0)
    with listener.accept(5.0) as connection:
        friend.sendall(b"hello")
        assert connection.recv(5) == b"hello"
        assert stranger.recv(1) == b"", "sent away"
    with pytest.raises(TimeoutError):
        listener.accept(0.01)
    listener.close()
    for each in (stranger, friend):
        each.close()
    assert read_all(seat, 1.0) == "", "nobody listens any more"
    assert not answers("127.0.0.1", listener.port)
