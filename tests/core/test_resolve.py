"""From settings to a resolved engine: what is chosen, why, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from interlace import Provider, hookimpl
from interlace.config import load_settings
from interlace.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    PluginConflictError,
    PluginContractError,
    PluginImportError,
    PluginNotFoundError,
)
from interlace.model_config import ModelConfig
from interlace.plugin_manager import PluginManager
from interlace.resolve import (
    DEFAULT_MAX_MODEL_LEN,
    check_portable,
    model_limit,
    open_tokenizer,
    resolve,
    resolve_device,
    resolve_dtype,
)

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def resolved(tmp_path):
    """Resolve a tiny model of random weights under the given settings."""

    def make(settings=None, config=None, extra=(), model=None):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(TINY | (config or {})))
        base = {"model": model or str(path), "checkpoint.use": "dummy", "device": "cpu"}
        loaded = load_settings(base | (settings or {}), env={})
        return resolve(loaded, PluginManager(loaded.settings, extra))

    return make


def test_everything_is_settled(resolved, tmp_path):
    spec = resolved({"cache.memory": "1MiB", "scheduler.watermark": 0.2, "seed": 3, "dtype": "float32"})
    assert spec.model_path == str(tmp_path / "config.json")
    assert (spec.architecture.name, spec.checkpoint.name) == ("LlamaForCausalLM", "dummy")
    assert (spec.scheduler.name, spec.executor.name) == ("fcfs", "uniprocess")
    assert (spec.dtype, spec.device, spec.max_model_len, spec.seed) == ("float32", "cpu", 512, 3)
    assert (spec.cache.memory_bytes, spec.limits.watermark) == (2**20, 0.2)
    assert spec.scheduler.package == "interlace" and spec.scheduler.version
    assert spec.open_checkpoint().config() == spec.model_config


def test_reasons_name_key_and_source(resolved):
    spec = resolved({"scheduler.use": "priority"})
    assert spec.scheduler.reason == "scheduler.use, constructor"
    assert spec.executor.reason == "executor.use, default"
    assert spec.checkpoint.reason == "checkpoint.use, constructor"
    assert spec.architecture.reason == "architecture LlamaForCausalLM"
    assert spec.attention[-1].reason.startswith("auto, choice ")


def test_options_reach_the_component(resolved):
    spec = resolved({"scheduler": {"use": "priority", "options": {"priority": {"aging_s": 30}}}})
    assert spec.scheduler.options == {"aging_s": 30.0}
    assert spec.scheduler.load_options(spec.scheduler.load()).aging_s == 30.0


def test_auto_skips_what_is_not_installed_and_ignores_what_is_not_listed(resolved):
    class Extra:
        @staticmethod
        @hookimpl
        def interlace_attention():
            yield Provider(name="extra", target="nowhere:Extra", api="1")

    assert "extra" not in [part.name for part in resolved(extra=[Extra]).attention]
    listed = resolved({"attention.auto_order": ["absent", "extra", "torch"]}, extra=[Extra])
    assert [part.name for part in listed.attention] == ["extra", "torch"]
    with pytest.raises(PluginNotFoundError, match=r"nothing of attention.auto_order = .'absent'. is installed"):
        resolved({"attention.auto_order": ["absent"]})


def test_share_of_memory(resolved):
    cache = resolved({"cache.memory": "25%", "cache.max_blocks": 9}).cache
    assert (cache.memory_bytes, cache.memory_share, cache.max_blocks) == (None, 0.25, 9)


@pytest.mark.parametrize(
    ("settings", "config", "kind", "expected"),
    [
        ({}, {"architectures": ["LlamaForCausalLn"]}, PluginNotFoundError, "no model architecture is called 'LlamaFor"),
        ({}, {"architectures": ["LlamaForCausalLn"]}, PluginNotFoundError, "Did you mean 'LlamaForCausalLM'?"),
        ({"scheduler.use": "fcsf"}, {}, PluginNotFoundError, "(scheduler.use, constructor). Did you mean 'fcfs'?"),
        ({"executor.use": "ray2"}, {}, PluginNotFoundError, "Installed executors: "),
        (
            {"scheduler": {"use": "gone", "options": {"gone": {}}}},
            {},
            PluginNotFoundError,
            "no scheduler is called 'gone'",
        ),
        ({"logits_processors.use": ["x"]}, {}, PluginNotFoundError, "no logits processor is called 'x'"),
        ({"max_model_len": 513}, {}, ConfigError, "max_model_len = 513 (constructor): model '"),
        ({"checkpoint.use": "auto"}, {}, CheckpointError, "no checkpoint format recognises it. Installed formats: "),
        ({"model": "smollm3"}, {}, ModelNotFoundError, "smollm3"),
    ],
)
def test_refusals(resolved, settings, config, kind, expected):
    with pytest.raises(kind) as caught:
        resolved(settings, config)
    assert expected in str(caught.value)


def test_third_party_scheduler_is_selected_by_name(resolved, install):
    install("demo", "rival")
    spec = resolved({"scheduler": {"use": "demo", "options": {"demo": {"window": 4}}}})
    assert (spec.scheduler.package, spec.scheduler.version) == ("interlace-demo", "1.2")
    assert spec.scheduler.options["window"] == 4
    assert resolved({"scheduler.use": "interlace-rival:twin"}).scheduler.target == "interlace_rival_scheduler:Twin"
    with pytest.raises(PluginConflictError):
        resolved({"scheduler.use": "twin"})
    with pytest.raises(PluginContractError):
        resolved({"scheduler.use": "incomplete"})
    with pytest.raises(PluginImportError):
        resolved({"scheduler.use": "unimportable"})


class MainPlugin:
    """As in a notebook: the provider's class lives in __main__."""

    @staticmethod
    @hookimpl
    def interlace_executors():
        yield Provider(name="mine", target="__main__:Mine", api="1")


def test_class_in_main_works_in_one_process_only(resolved, monkeypatch):
    settings = {"executor.use": "mine"}
    spec = resolved(settings, extra=[MainPlugin])
    main = types.ModuleType("__main__")
    from interlace.interfaces.executor import Executor

    main.Mine = type("Mine", (Executor,), {name: lambda self: None for name in Executor.__abstractmethods__})
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert spec.executor.load() is main.Mine
    for refuse in (
        lambda: check_portable(spec),
        lambda: resolved(settings | {"engine.process": "subprocess"}, extra=[MainPlugin]),
    ):
        with pytest.raises(PluginImportError, match=r"defined in __main__ exists in that process only.*'inline'"):
            refuse()


def test_built_in_checkpoint_formats_are_asked_first(resolved, smollm2_path):
    class Greedy:
        @staticmethod
        @hookimpl
        def interlace_checkpoints():
            yield Provider(name="aaa", target="nowhere:Greedy", api="1")

    spec = resolved({"checkpoint.use": "auto"}, extra=[Greedy], model=str(smollm2_path))
    assert spec.checkpoint.name == "gguf" and "recognises SmolLM2" in spec.checkpoint.reason


def test_chat_template_of_the_settings(resolved, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}!")
    spec = resolved()
    assert open_tokenizer(load_settings(env={}), spec).chat_template is None
    assert open_tokenizer(load_settings({"chat_template": str(template)}, env={}), spec).chat_template is not None
    with pytest.raises(ConfigError, match=r"chat_template = '.*none.jinja' .constructor. cannot be read"):
        open_tokenizer(load_settings({"chat_template": str(tmp_path / "none.jinja")}, env={}), spec)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags : fpu avx512f avx512_bf16 amx_int8", "bfloat16"),
        ("flags : fpu amx_bf16", "bfloat16"),
        ("flags : fpu avx512f", "float32"),
    ],
)
def test_dtype_follows_the_cpu(tmp_path, flags, dtype):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(flags)
    assert resolve_dtype("auto", "cpu", cpuinfo) == dtype
    assert resolve_dtype("float16", "cpu", cpuinfo) == "float16"
    assert resolve_dtype("auto", "cuda", cpuinfo) == "bfloat16"
    assert resolve_dtype("auto", "cpu", tmp_path / "none") == "float32"


def test_device_that_is_not_there():
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"device = 'cuda:99'"):
        resolve_device("cuda:99")


@pytest.mark.parametrize(
    ("positions", "rope", "limit"),
    [
        (4096, {}, 4096),
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (131072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        (131072, {"rope_type": "linear", "factor": 8.0}, 131072),
    ],
)
def test_limit_of_the_model(positions, rope, limit, resolved):
    config = ModelConfig.from_hf(TINY | {"max_position_embeddings": positions, "rope_scaling": rope or None}, "test")
    assert model_limit(config) == limit


def test_default_length_is_capped(resolved):
    assert resolved(config={"max_position_embeddings": 131072}).max_model_len == DEFAULT_MAX_MODEL_LEN
    assert resolved({"max_model_len": 131072}, {"max_position_embeddings": 131072}).max_model_len == 131072


def test_resolving_loads_no_torch(smollm2_path):
    code = (
        "import sys; from interlace.config import load_settings; from interlace.plugin_manager import PluginManager; "
        "from interlace.resolve import resolve, open_tokenizer; "
        f"l = load_settings({{'model': {str(smollm2_path)!r}, 'device': 'cpu'}}, env={{}}); "
        "s = resolve(l, PluginManager(l.settings)); open_tokenizer(l, s); "
        "print(s.architecture.name, [m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "LlamaForCausalLM []", done.stderr


def test_path_of_the_embedded_model_by_default(smollm2_path):
    loaded = load_settings({"device": "cpu"}, env={})
    assert Path(resolve(loaded, PluginManager(loaded.settings)).model_path).name == smollm2_path.name
