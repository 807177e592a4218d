"""No rank holds the whole model, not even while it loads: measured, each rank in a process of its own.

What counts is memory of the process itself. Beside it the kernel maps pages of the file that were looked at; they are
shared by all ranks of a machine and given up when memory is short."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
SHAPES = {
    "self_attn.q_proj": (1024, 1024),
    "self_attn.k_proj": (256, 1024),
    "self_attn.v_proj": (256, 1024),
    "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (4096, 1024),
    "mlp.up_proj": (4096, 1024),
    "mlp.down_proj": (1024, 4096),
}
MIB = 1 << 20
SLACK = 36 * MIB
"""For 8 MiB of KV cache, what libraries take when they are first used, and the layer that is being prepared."""

LOAD = """
import json, re, sys, threading
from pathlib import Path
import torch
from interlace.config import load_settings
from interlace.interfaces.model import Parallel
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve
from interlace.worker.place import Place
from interlace.worker.worker import Worker

folder, rank, size, stages, kernels = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

place = Place.of(rank, size, stages)
parallel = Parallel()
parallel.rank, parallel.size, parallel.stage, parallel.num_stages = place.tensor_rank, size, place.stage, stages
given = {"model": folder, "dtype": "float32", "max_model_len": 64, "cache.memory": "8MiB", "threads": 1}
loaded = load_settings({**given, "kernels.use": kernels}, env={})
worker = Worker(resolve(loaded, PluginManager(loaded.settings)), lambda event: None, place=place, parallel=parallel)
worker.prepare()
torch.zeros(1)
before, peak, over = status("RssAnon"), 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, status("RssAnon"))

watching = threading.Thread(target=watch)
watching.start()
worker.start()
over.set()
watching.join()
held = worker._runner._model.num_parameters * 4
print(json.dumps({"held": held, "kept": status("RssAnon") - before, "peak": peak - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(directory of a model, bytes of its weights)."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("wide")
    tensors = {"model.embed_tokens.weight": torch.randn(16384, 1024), "model.norm.weight": torch.ones(1024)}
    for layer in range(4):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(1024)
    tensors["lm_head.weight"] = torch.randn(16384, 1024)
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder, sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "rank", "size", "stages"),
    [("native", 1, 4, 1), ("torch", 3, 4, 1), ("native", 1, 1, 4), ("native", 2, 2, 2)],
)
def test_a_rank_takes_its_part_of_the_memory(checkpoint, kernels, rank, size, stages):
    folder, whole = checkpoint
    command = [sys.executable, "-c", LOAD, str(folder), *map(str, (rank, size, stages)), kernels]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    report = ", ".join(f"{what} {found[what] / MIB:.0f}" for what in ("held", "kept", "peak"))
    print(f"rank {rank} of {size} x {stages}, {kernels}: of {whole / MIB:.0f} MiB {report}")
    assert found["held"] < 0.45 * whole
    assert found["kept"] < found["held"] + SLACK
    assert found["peak"] < found["held"] + 2 * SLACK
