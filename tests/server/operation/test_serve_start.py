"""How `interlace serve` begins: what must not start says why, and what starts calls nobody."""

import json
import signal
import socket
import subprocess
import sys

import pytest

RUN = "import sys; from interlace.cli import main; sys.exit(main())"


def run_to_the_end(settings, timeout=60):
    """For servers that must not start: (exit code, stderr)."""
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run([sys.executable, "-c", RUN, "serve", *flags], capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stderr


def test_a_fault_in_the_settings_is_one_message_before_anything_is_loaded(tmp_path):
    """The model does not exist: if it were looked at first, the message would be about it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, text = run_to_the_end({"model": tmp_path / "none", "server.port": port})
    assert code == 2
    assert f"port {port} is in use by another process" in text
    assert "Traceback" not in text
    code, text = run_to_the_end({"model": tmp_path / "none", "server.tls_certificate": tmp_path / "none.pem"})
    assert code == 2
    assert "server.tls_certificate" in text


def test_in_a_json_log_even_that_is_json(tmp_path):
    code, text = run_to_the_end({"model": tmp_path / "none", "server.port": 0, "server.log_format": "json"})
    assert code == 2
    entries = [json.loads(line) for line in text.splitlines()]
    assert entries[-1]["level"] == "CRITICAL"
    assert str(tmp_path / "none") in entries[-1]["message"]


CALLS_OUT = """
import sys
def forbid(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        target = arguments[1] if event != "socket.getaddrinfo" else arguments[0]
        host = target[0] if isinstance(target, tuple) else target
        if not (isinstance(target, (str, bytes)) and event == "socket.connect") and host not in (None, "127.0.0.1"):
            sys.stderr.write(f"CALLED OUT: {event} {target}\\n")
sys.addaudithook(forbid)
"""


@pytest.mark.slow
def test_nothing_phones_home(start, tmp_path, monkeypatch):
    """With the embedded model, in both processes, and without the switch that keeps the hub's client offline."""
    (tmp_path / "sitecustomize.py").write_text(CALLS_OUT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = start({"model": "smollm2", "checkpoint.use": "auto", "cache.memory": "64MiB"})
    with server.client() as client:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        response = client.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["model"]) == (200, "smollm2")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "CALLED OUT" not in server.log
    probe = [sys.executable, "-c", "import socket; socket.getaddrinfo('example.invalid', 80)"]
    assert "CALLED OUT" in subprocess.run(probe, capture_output=True, text=True).stderr  # the guard is awake
