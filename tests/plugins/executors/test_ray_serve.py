"""`interlace serve` on a Ray cluster, with the configuration that the documentation shows, over real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

DOCUMENT = Path(__file__).parents[3] / "docs" / "scaling.md"
ADDRESS = re.compile(r"serving .* at (http\S+) after")
RUN = "import sys; from interlace.cli import main; sys.exit(main())"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "torch_dtype": "float32",
}
SETTINGS = """
[checkpoint]
use = "dummy"
[cache]
memory = "32MiB"
[server]
port = 0
"""
SHORT = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 6000, "stream": True}


def documented():
    """The configurations of the documentation: `multiprocess`, `ray`, and whole engines in the cluster."""
    section = DOCUMENT.read_text().partition("## Several machines: Ray")[2].partition("\n## ")[0]
    blocks = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    assert ['use = "multiprocess"' in block for block in blocks[:2]] == [True, False]
    assert 'engine_core = "cluster"' in blocks[2] and "replicas = 4" in blocks[2]
    return blocks[:3]


def command(folder, executor, *flags):
    (folder / "config.json").write_text(json.dumps(TINY))
    config = folder / "engine.toml"
    config.write_text(f'model = "{folder}"\ndevice = "cpu"\nmax_model_len = 8192\n{SETTINGS}\n{executor}')
    return [sys.executable, "-c", RUN, "serve", "--config", str(config), *flags]


class Server:
    """`interlace serve` in a process of its own."""

    def __init__(self, folder, executor, *flags):
        self._log = (folder / f"log-{time.monotonic_ns()}").open("w+b")
        self.process = subprocess.Popen(command(folder, executor, *flags), stdout=self._log, stderr=self._log)
        self.until(lambda: ADDRESS.search(self.log), 120)
        self.client = httpx.Client(base_url=ADDRESS.search(self.log)[1].rstrip('",'), timeout=60)

    @property
    def log(self):
        return Path(self._log.name).read_text()

    def until(self, condition, seconds=90.0):
        for _ in range(int(seconds / 0.05)):
            if condition():
                return
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(self.log)

    def complete(self):
        answer = self.client.post("/v1/completions", json=SHORT)
        assert answer.status_code == 200, (answer.text, self.log)
        return answer.json()["choices"][0]["text"]

    def stream(self, chunks, started):
        """Read a long answer into `chunks`."""
        with self.client.stream("POST", "/v1/completions", json=LONG) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
                    started.set()

    def close(self):
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        status = self.process.wait(60)
        self._log.close()
        return status


@contextlib.contextmanager
def serving(folder, executor, *flags):
    server = Server(folder, executor, *flags)
    try:
        yield server
    finally:
        assert server.close() == 0


@contextlib.contextmanager
def streaming(server):
    """The chunks of an answer under way; read to its end when the block ends."""
    chunks, started = [], threading.Event()
    reader = threading.Thread(target=server.stream, args=(chunks, started))
    reader.start()
    assert started.wait(60), server.log
    yield chunks
    reader.join(120)
    assert not reader.is_alive()


def ranks_of(raylets, kind="RankActor"):
    """Rank process → the node it is on. `EngineActor`: of whole engines."""
    children = {child: pid for pid in raylets for child in psutil.Process(pid).children()}
    return {child: pid for child, pid in children.items() if kind in child.name() + "".join(child.cmdline())}


def engines_of(raylets):
    return ranks_of([pid for pid in raylets if psutil.pid_exists(pid)], "EngineActor")


def kill_node(raylet):
    """Everything that runs on a simulated node, at once: the machine is gone."""
    node = psutil.Process(raylet)
    for process in (node, *node.children(recursive=True)):
        process.kill()


def on(cluster, block):
    """The documented section, with the address of this cluster, and each rank on a node of its own."""
    assert "address" in block and "placement" in block
    block = re.sub(r'address = ".*"', f'address = "{cluster.address}"', block)
    return re.sub(r'placement = ".*"', 'placement = "strict_spread"', block)


def test_from_multiprocess_to_ray_by_one_section_and_on_when_a_node_is_lost(ray_cluster, tmp_path):
    multiprocess, ray, _ = documented()
    with serving(tmp_path, multiprocess) as server:
        expected = server.complete()
    third = ray_cluster.add_node()
    with serving(tmp_path, on(ray_cluster, ray)) as server:
        assert server.complete() == expected
        ranks = ranks_of(ray_cluster.raylets)
        assert len(set(ranks.values())) == 2, "two ranks, each on a node of its own"
        victim = max(ranks.values(), key=lambda node: (node == third, node != ray_cluster.raylets[0]))
        (lost,) = [rank.pid for rank, node in ranks.items() if node == victim]
        with streaming(server) as chunks:
            kill_node(victim)
        error = chunks[-1]["error"]
        assert error["code"] == "engine_restarting"
        assert f"(pid {lost} on node " in error["message"] and " is lost: nothing answers there" in error["message"]
        server.until(lambda: server.client.get("/health").json()["status"] == "ok")
        assert server.client.get("/health").json()["restarts"] >= 1
        assert server.complete() == expected
        left = [pid for pid in ray_cluster.raylets if pid != victim]
    assert not ranks_of(left), "no rank outlives its server"
    assert all(psutil.pid_exists(pid) for pid in left), "the cluster goes on"


def test_replicas_whose_ranks_are_actors(ray_cluster, tmp_path):
    executor = f'[executor]\nuse = "ray"\n[executor.options.ray]\naddress = "{ray_cluster.address}"\n'
    nodes = [pid for pid in ray_cluster.raylets if psutil.pid_exists(pid)]
    with serving(tmp_path, executor, "--engine.replicas", "2", "--router.use", "round_robin") as server:
        ranks = list(ranks_of(nodes))
        assert len(ranks) == 2
        with streaming(server) as first, streaming(server) as second:
            os.kill(ranks[0].pid, signal.SIGKILL)
        ends = [chunks[-1] for chunks in (first, second)]
        errors = [end["error"]["message"] for end in ends if "error" in end]
        assert len(errors) == 1 and f"(pid {ranks[0].pid} on node " in errors[0], "its own requests, and no others"
        assert len(max(first, second, key=len)) >= LONG["max_tokens"] // 2
        server.until(lambda: server.client.get("/health").json()["status"] == "ok")
        assert len(ranks_of(nodes)) == 2, "it has come back"


def test_a_cluster_of_its_own(ray_environment, tmp_path):
    with serving(tmp_path, "", "--executor.use", "ray") as server:
        assert server.complete()
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert any("gcs_server" in process.name() for process in family)
    assert not psutil.wait_procs(family, 10)[1], "it ends with the server"


# ── whole engines in the cluster ──────────────────────────────────────────────────────────────────────────────


def whole(cluster, replicas=2, **options):
    """The documented configuration, for this cluster."""
    block = re.sub(r'address = ".*"', f'address = "{cluster.address}"', documented()[2])
    block = block.replace("replicas = 4", f"replicas = {replicas}").replace(
        "threads_per_rank = 4", "threads_per_rank = 1"
    )
    return block + "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())


def test_replicas_in_the_cluster_are_lost_and_come_back_one_by_one(ray_cluster, tmp_path):
    with serving(tmp_path, "") as server:
        expected = server.complete()
    third = ray_cluster.add_node()
    config = whole(ray_cluster, 3, placement_timeout_s=60.0)
    with serving(tmp_path, config, "--router.use", "round_robin") as server:
        engines = engines_of(ray_cluster.raylets)
        assert len(engines) == 3 and set(engines.values()) >= {third}, "Ray spreads them"
        assert [server.complete() for _ in range(3)] == [expected] * 3
        assert server.log.count(" on node ") >= 3, "their logs are the server's"
        (victim,) = [engine for engine, node in engines.items() if node == third]

        with contextlib.ExitStack() as reading:
            answers = [reading.enter_context(streaming(server)) for _ in range(3)]
            victim.kill()
        lost = one_lost(answers)
        assert re.search(rf"replica \d of 3: the engine process \(pid {victim.pid} on node [\d.]+\) is gone: ", lost)
        assert "its worker process has died" in lost, "Ray's own words"
        server.until(lambda: server.client.get("/health").json()["status"] == "ok")
        assert [server.complete() for _ in range(3)] == [expected] * 3

        engines = engines_of(ray_cluster.raylets)
        assert len(engines) == 3 and victim not in engines
        node = next(node for node in engines.values() if node != ray_cluster.raylets[0])
        with contextlib.ExitStack() as reading:
            answers = [reading.enter_context(streaming(server)) for _ in range(3)]
            kill_node(node)
        assert " is lost: nothing answers there" in one_lost(answers)
        health = server.client.get("/health")
        assert health.status_code == 200 and health.json()["status"] == "degraded"
        server.until(lambda: server.client.get("/health").json()["status"] == "ok")
        assert [server.complete() for _ in range(3)] == [expected] * 3
        metrics = server.client.get("/metrics").text
        assert len(re.findall(r'^interlace:engine_up{.*engine="[012]".*} 1', metrics, re.MULTILINE)) == 3
        engines = engines_of(ray_cluster.raylets)
        assert len(engines) == 3 and node not in engines.values(), "on the nodes that are left"
    assert not engines_of(ray_cluster.raylets)


def one_lost(answers):
    """Exactly one of them ended with an error, which is this; the others ended as they should."""
    ends = [chunks[-1] for chunks in answers]
    errors = [end["error"] for end in ends if "error" in end]
    assert [error["code"] for error in errors] == ["engine_restarting"], ends
    assert all(end["choices"][0]["finish_reason"] == "length" for end in ends if "error" not in end)
    return errors[0]["message"]


def test_a_front_that_is_killed_leaves_no_actor(ray_cluster, tmp_path):
    config = whole(ray_cluster, 1, tensor_parallel=2)
    server = Server(tmp_path, config)
    assert server.complete()
    (engine,) = engines_of(ray_cluster.raylets)
    family = [engine, *engine.children(recursive=True), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(engine.children()) >= 2, "its ranks are processes of its node"
    server.process.kill()
    assert not psutil.wait_procs(family, 20)[1]
    assert server.close() == -signal.SIGKILL


def test_engines_that_cannot_start(ray_cluster, tmp_path):
    def why(config, *flags):
        done = subprocess.run(command(tmp_path, config, *flags), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        return done.stderr

    text = why(whole(ray_cluster, placement_timeout_s=1.0, tensor_parallel=64))
    assert "no room for engine " in text and " of 2: asked for 64 CPU on one node, not given within" in text
    text = why(whole(ray_cluster, 1), "--cache.memory", "1KiB")
    assert "(said on node " in text
    text = why(whole(ray_cluster, 1).replace(ray_cluster.address, ""))
    assert "engine_core = 'cluster' needs the address of a cluster" in text
    assert not engines_of(ray_cluster.raylets)
