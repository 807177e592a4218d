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
    """The `[executor]` sections of the documentation: of `multiprocess`, then of `ray`."""
    section = DOCUMENT.read_text().partition("## Several machines: Ray")[2].partition("\n## ")[0]
    blocks = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    assert ['use = "multiprocess"' in block for block in blocks[:2]] == [True, False]
    return blocks[:2]


class Server:
    """`interlace serve` in a process of its own."""

    def __init__(self, folder, executor, *flags):
        (folder / "config.json").write_text(json.dumps(TINY))
        config = folder / "engine.toml"
        config.write_text(f'model = "{folder}"\ndevice = "cpu"\nmax_model_len = 8192\n{SETTINGS}\n{executor}')
        self._log = (folder / f"log-{time.monotonic_ns()}").open("w+b")
        command = [sys.executable, "-c", RUN, "serve", "--config", str(config), *flags]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
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


def ranks_of(raylets):
    """Rank process → the node it is on."""
    children = {child: pid for pid in raylets for child in psutil.Process(pid).children()}
    return {child: pid for child, pid in children.items() if "RankActor" in child.name() + "".join(child.cmdline())}


def on(cluster, block):
    """The documented section, with the address of this cluster, and each rank on a node of its own."""
    assert "address" in block and "placement" in block
    block = re.sub(r'address = ".*"', f'address = "{cluster.address}"', block)
    return re.sub(r'placement = ".*"', 'placement = "strict_spread"', block)


def test_from_multiprocess_to_ray_by_one_section_and_on_when_a_node_is_lost(ray_cluster, tmp_path):
    multiprocess, ray = documented()
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
            node = psutil.Process(victim)
            for process in (node, *node.children(recursive=True)):
                process.kill()
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
