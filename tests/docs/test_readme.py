"""Everything in the README works: its snippets run, its commands answer, its configuration files are valid."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time

import pytest

from interlace.config import load_settings

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = "import sys; from interlace.cli import main; sys.exit(main())"
NOT_RUN_HERE = ("make ", "interlace chat")
"""`make` targets run in CI's own steps, and `chat` has tests of its own on a terminal."""
AT_A_SERVER = ("curl ", "interlace bench serve")
HERE = "127.0.0.1:8000"
"""Where the README's server listens; that of the tests takes any free port."""
REQUEST = {"method": "POST", "url": "/v1/completions", "body": {"model": "smollm2", "prompt": "Hi", "max_tokens": 2}}


@pytest.fixture(scope="module")
def readme(repo_root) -> list[tuple[str, str]]:
    """(language, text) of every code block."""
    return BLOCK.findall((repo_root / "README.md").read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(readme, tmp_path_factory):
    """A folder with the README's configuration files, and those that its commands read."""
    path = tmp_path_factory.mktemp("readme")
    engine, server, scaled = (text for language, text in readme if language == "toml")
    (path / "engine.toml").write_text(engine)
    (path / "server.toml").write_text(server)
    (path / "scaled.toml").write_text(scaled)
    (path / "requests.jsonl").write_text(json.dumps({"custom_id": "one"} | REQUEST) + "\n")
    return path


@pytest.fixture(scope="module")
def commands(readme) -> list[str]:
    """The command lines, in order."""
    lines = [line for language, text in readme if language == "console" for line in text.splitlines()]
    return [line.removeprefix("$ ").partition("  # ")[0] for line in lines if line.startswith("$ ")]


def run(arguments, folder):
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_every_snippet_runs(readme, folder):
    snippets = [text for language, text in readme if language == "python" and HERE not in text]
    assert len(snippets) == 2
    for snippet in snippets:
        done = run([sys.executable, "-c", snippet], folder)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 10


def test_every_command_answers(commands, folder):
    ran = 0
    for command in commands:
        if command.startswith((*NOT_RUN_HERE, *AT_A_SERVER)) or command == "interlace serve":
            continue
        program, *arguments = shlex.split(command)
        assert program == "interlace", command
        done = run([sys.executable, "-c", RUN, *arguments], folder)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert (done.stdout or done.stderr).strip(), command  # a batch answers into its file
        ran += 1
    assert ran >= 10
    assert json.loads((folder / "answers.jsonl").read_text())["response"]["status_code"] == 200


@pytest.fixture
def server(commands, folder):
    """The address of `interlace serve`."""
    assert "interlace serve" in commands
    log = folder / "serve.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, "serve", "--server.port=0"], cwd=folder, stdout=errors, stderr=errors
        )
    try:
        for _ in range(1200):
            found = re.search(r"serving smollm2 at http://(\S+) after", log.read_text())
            if found:
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_what_is_done_with_a_server(readme, commands, folder, server):
    asked = [command for command in commands if command.startswith(AT_A_SERVER)]
    assert {command.split()[0] for command in asked} == {"curl", "interlace"}
    for command in asked:
        program, *arguments = shlex.split(command.replace(HERE, server))
        if program == "curl":
            done = run([program, "--silent", *arguments], folder)
            assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0, done.stdout
        else:
            done = run([sys.executable, "-c", RUN, *arguments, f"--base-url=http://{server}/v1"], folder)
            assert done.returncode == 0 and "TTFT" in done.stdout, done.stderr
    [snippet] = [text for language, text in readme if language == "python" and HERE in text]
    done = run([sys.executable, "-c", snippet.replace(HERE, server)], folder)
    assert done.returncode == 0 and len(done.stdout) > 10, done.stderr


def test_the_file_that_scales_out_is_valid(folder):
    done = run([sys.executable, "-c", RUN, "config", "plan", "--config", "scaled.toml"], folder)
    assert done.returncode == 0, done.stderr
    assert "multiprocess" in done.stdout
    settings = load_settings(config_file=folder / "scaled.toml", env={}).settings
    assert settings.engine.replicas == 2 and settings.router.use == "prefix_affinity"


def test_the_file_of_a_server_is_valid(folder):
    settings = load_settings(config_file=folder / "server.toml", env={}).settings
    assert settings.server.host == "0.0.0.0" and settings.server.metrics_compat == "vllm"


def test_the_make_targets_exist(readme, repo_root):
    makefile = (repo_root / "Makefile").read_text("utf-8")
    targets = re.findall(r"make ([a-z-]+)", (repo_root / "README.md").read_text("utf-8"))
    assert {"demo", "test", "setup"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets
