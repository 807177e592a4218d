"""The example packages as a stranger meets them: wheels, installed with pip beside Interlace's, and taken away again.

The environment is a fresh venv. Its packages are exactly the wheels built here; what they depend on (torch and some
two hundred more) is not downloaded again, but linked from the environment that runs the tests, all except Interlace
itself. Putting that environment's whole site-packages on the path would not do: its editable Interlace would be found
where a wheel lacks a file, and its metadata would survive an uninstall.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = ("interlace-predictive", "interlace-watermark", "interlace-gpt2")

CONFIG = """
device = "cpu"
[cache]
memory = "64MiB"
[scheduler]
use = "predictive"
[scheduler.options.predictive]
aging = 5.0
label = "task"
[logits_processors]
use = ["watermark"]
[logits_processors.options.watermark]
key = "the operator's"
delta = 4.0
"""

GENERATE = """
from interlace import LLM, SamplingParams
from interlace_watermark.detect import detect

plain = SamplingParams(max_tokens=100, seed=1, ignore_eos=True)
marked = SamplingParams(max_tokens=100, seed=1, ignore_eos=True, logits_processors={"watermark": {}})
with LLM(config="engine.toml") as llm:
    outputs = llm.generate(["Once upon a time"] * 2, [plain, marked])
for output in outputs:
    print(detect(output.outputs[0].token_ids, "the operator's").z_score)
"""

RESOLVE = """
import sys
from interlace.config import load_settings
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve

loaded = load_settings(config_file="gpt2.toml")
assert resolve(loaded, PluginManager(loaded.settings)).model_config.hidden_size == 32
assert "torch" not in sys.modules, "reading the configuration of GPT-2 imported torch"
"""


class Environment:
    """A venv with the given wheels. Commands run in its folder, and know nothing of the environment around."""

    def __init__(self, folder: Path, wheels: list[Path]) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
        self.python = folder / "venv" / "bin" / "python"
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (site / "dependencies.pth").write_text(f"{link_dependencies(folder / 'dependencies')}\n")
        self.pip("install", "--no-deps", "--no-index", *map(str, wheels))

    def pip(self, *arguments: str) -> None:
        """The pip that runs the tests, at work in this environment."""
        self._run([sys.executable, "-m", "pip", "--python", str(self.python), "--quiet", *arguments])

    def interlace(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """The command `interlace` as the wheel installed it."""
        return self._run([str(self.python.with_name("interlace")), *arguments], status)

    def run(self, *arguments: str) -> str:
        return self._run([str(self.python), *arguments]).stdout

    def _run(self, command: list[str], status: int = 0) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("INTERLACE_", "PYTHON"))}
        options = {"cwd": self.folder, "env": variables, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, **options)
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


def link_dependencies(folder: Path) -> Path:
    """A folder that shows what is installed around here, but for Interlace and plugins of it."""
    folder.mkdir()
    for site in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        for path in Path(site).iterdir():
            if not re.match("interlace|__editable__|__pycache__", path.name) and path.suffix != ".pth":
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def wheels(repo_root, tmp_path_factory) -> list[Path]:
    """Interlace's wheel, built by way of the source archive, and one of each example."""
    target, sources = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("sources")
    commands = [["build", "--no-isolation", "--outdir", str(target), str(repo_root)]]
    for name in EXAMPLES:
        shutil.copytree(repo_root / "docs" / "examples" / name, sources / name)
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
        commands.append(["pip", "wheel", *options, str(sources / name)])
    for command in commands:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    found = sorted(target.glob("*.whl"))
    assert len(found) == 1 + len(EXAMPLES)
    return found


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("environment"), wheels)
    (made.folder / "engine.toml").write_text(CONFIG)
    return made


def write_gpt2(folder: Path) -> tuple[list[int], list[int]]:
    """A tiny GPT-2 with random weights, as transformers saves it; returns a prompt and its greedy continuation."""
    import torch
    import transformers

    from interlace.plugins.checkpoints.dummy import byte_tokenizer
    from interlace.testing.parity import transformers_greedy

    torch.manual_seed(3)
    numbers = {"vocab_size": 258, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    config = transformers.GPT2Config(**numbers, bos_token_id=256, eos_token_id=257)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer("gpt2").backend.save(str(folder / "tokenizer.json"))
    prompt = list(b"How are you?")
    return prompt, transformers_greedy(model, prompt, 24, [257]).token_ids


def test_only_the_wheels_are_seen(environment):
    code = "import interlace, sys; print(interlace.__file__); print(*sys.path)"
    file, path = environment.run("-c", code).splitlines()
    assert Path(file).is_relative_to(environment.folder / "venv")
    assert sysconfig.get_paths()["purelib"] not in path.split()


def test_the_config_file_selects_what_pip_installed(environment):
    listed = json.loads(environment.interlace("plugins", "list", "--config", "engine.toml", "--json").stdout)
    found = {entry["package"]: entry for entry in listed if entry["package"] in EXAMPLES}
    assert {package: entry["name"] for package, entry in found.items()} == {
        "interlace-predictive": "predictive",
        "interlace-watermark": "watermark",
        "interlace-gpt2": "GPT2LMHeadModel",
    }
    assert {entry["version"] for entry in found.values()} == {"0.1.0"}
    assert found["interlace-predictive"]["state"] == found["interlace-watermark"]["state"] == "selected"
    environment.interlace("plugins", "doctor", "--config", "engine.toml")


def test_the_embedded_model_writes_with_both(environment):
    plain, marked = map(float, environment.run("-c", GENERATE).split())
    assert plain < 4 < marked


def test_gpt2_writes_what_transformers_writes(environment):
    prompt, expected = write_gpt2(environment.folder / "gpt2")
    (environment.folder / "gpt2.toml").write_text(f'model = "./gpt2"\ndtype = "float32"\n{CONFIG}')
    environment.run("-c", RESOLVE)
    (environment.folder / "prompts.json").write_text(json.dumps([{"prompt_token_ids": prompt}]))
    arguments = ["--prompts-file", "prompts.json", "--max-tokens", "24", "--json"]
    answers = json.loads(environment.interlace("generate", "--config", "gpt2.toml", *arguments).stdout)
    assert answers[0]["outputs"][0]["token_ids"] == expected


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_own_tests_and_conformance_suite_pass(environment, repo_root, name):
    """Beside the tests lies only the configuration of pytest: the package they import is the installed one."""
    folder = environment.folder / "tests" / name
    shutil.copytree(repo_root / "docs" / "examples" / name / "tests", folder / "tests")
    shutil.copy(repo_root / "docs" / "examples" / name / "pyproject.toml", folder)
    told = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder))
    assert re.search(r"^\d+ passed", told, re.MULTILINE) and "skipped" not in told


def test_taken_away_they_are_missed_with_a_cure(wheels, tmp_path):
    environment = Environment(tmp_path, wheels)
    write_gpt2(tmp_path / "gpt2")
    (tmp_path / "engine.toml").write_text(CONFIG)
    environment.interlace("config", "plan", "--config", "engine.toml")
    environment.pip("uninstall", "--yes", *EXAMPLES)
    for arguments, noun, name in (
        (["--config", "engine.toml"], "scheduler", "predictive"),
        (["--config", "engine.toml", "--scheduler.use", "fcfs"], "logits processor", "watermark"),
        (["--model", "./gpt2"], "model architecture", "GPT2LMHeadModel"),
    ):
        told = environment.interlace("config", "plan", *arguments, status=2).stderr
        assert f"no {noun} is called '{name}'" in told
        assert "Installed " in told and f"install the package that provides '{name}'" in told
