"""Real servers for the tests of their operation, with a tiny model of random weights that loads at once."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ADDRESS = re.compile(r"serving .* at (\S+) after")
START_LIMIT = 120.0
RUN = "import sys; from interlace.cli import main; sys.exit(main())"

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}


class ServerProcess:
    """`interlace serve` in a process of its own."""

    def __init__(self, folder: Path, settings: dict[str, object]) -> None:
        self.errors = folder / "stderr.log"
        flags = [f"--{key}={value}" for key, value in settings.items()]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, "serve", *flags],
                stderr=errors,
                stdout=errors,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self.url = ""

    def wait_until_ready(self) -> ServerProcess:
        """Until it says where it serves."""
        for _ in range(int(START_LIMIT / 0.05)):
            found = ADDRESS.search(self.log)
            if found:
                self.url = found[1].rstrip('",')
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start (status {self.process.poll()}):\n{self.log}")

    @property
    def log(self) -> str:
        return self.errors.read_text()

    def wait_for_log(self, text: str) -> None:
        wait_until(lambda: text in self.log, lambda: f"{text!r} is not in the log:\n{self.log}")

    def client(self, key: str | None = None, **options) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if self.url.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=self.url.removeprefix("unix:"))
            return httpx.Client(base_url="http://localhost", headers=headers, transport=transport, timeout=60)
        if self.url.startswith("http:"):
            options["verify"] = False  # reading the certificates of the world takes longer than many a test
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def wait_running(self, count: int) -> None:
        """Until the engine itself runs so many requests, and nothing waits."""

        def state() -> tuple[int, int]:
            health = client.get("/health").json()
            return health["num_running"], health["num_waiting"]

        with self.client() as client:
            wait_until(lambda: state() == (count, 0), lambda: f"{state()} and not {count} run:\n{self.log}")

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A bare connection."""
        raw = socket.socket()
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", int(self.url.rpartition(":")[2])))
        return raw

    @property
    def engines(self) -> list[psutil.Process]:
        """Its child processes."""
        return psutil.Process(self.process.pid).children()

    @property
    def memory(self) -> int:
        """Resident bytes of the front."""
        return psutil.Process(self.process.pid).memory_info().rss

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 60.0) -> int:
        return self.process.wait(timeout)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def wait_until(condition, explain=lambda: "it never happened", timeout: float = 60.0) -> None:
    for _ in range(int(timeout / 0.05)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(explain())


def _certificate(folder, name="server", passphrase=None):
    """(certificate file, key file), self-signed for localhost."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    hidden = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    files = folder / f"{name}.crt", folder / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(encoding))
    files[1].write_bytes(key.private_bytes(encoding, form, hidden))
    return files


@pytest.fixture
def make_certificate():
    """`make_certificate(folder, name, passphrase)`"""
    return _certificate


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def tiny_settings(tiny_model) -> dict[str, object]:
    return {
        "model": tiny_model,
        "checkpoint.use": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "cache.memory": "32MiB",
        "threads": 1,
        "server.port": 0,
    }


@pytest.fixture
def start(tmp_path, tiny_settings) -> Iterator:
    """`start({"server.port": 0})` runs a server until the test ends."""
    with contextlib.ExitStack() as stack:
        count = 0

        def begin(settings=None, *, ready=True) -> ServerProcess:
            nonlocal count
            count += 1
            folder = tmp_path / f"server-{count}"
            folder.mkdir()
            server = ServerProcess(folder, tiny_settings | (settings or {}))
            stack.callback(server.close)
            return server.wait_until_ready() if ready else server

        yield begin
