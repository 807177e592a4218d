"""Where the server listens: sockets, unix sockets and TLS, checked before the model is loaded."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
import stat
from pathlib import Path

from interlace.config import LoadedSettings
from interlace.errors import ConfigError

BACKLOG = 2048


class Listener:
    """A bound socket. It answers connections once something listens on it; until then they are refused."""

    def __init__(self, socket_: socket.socket, url: str, unix_path: Path | None = None) -> None:
        self.socket = socket_
        self.url = url
        """How clients reach it: `http://127.0.0.1:8000`, or `unix:/run/interlace.sock`."""
        self.unix_path = unix_path

    def listen(self) -> None:
        """Let clients connect. Raises `ConfigError` if another process began to listen on the address since."""
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {self.url}: {error.strerror}") from None

    def close(self) -> None:
        """Close the socket and remove its path. May be called twice."""
        self.socket.close()
        if self.unix_path is not None:
            self.unix_path.unlink(missing_ok=True)
            self.unix_path = None


def bind(loaded: LoadedSettings, *, have_keys: bool) -> Listener:
    """Take the address that the settings name. Raises `ConfigError` if it is in use, cannot be had, or would be open
    to other machines although there are no keys."""
    if loaded.settings.server.unix_socket is not None:
        return _bind_unix(loaded.settings.server.unix_socket, loaded.source("server.unix_socket"))
    return _bind_tcp(loaded, have_keys)


def _bind_tcp(loaded: LoadedSettings, have_keys: bool) -> Listener:
    settings = loaded.settings.server
    host, where = settings.host, f"server.host = '{settings.host}' ({loaded.source('server.host')})"
    try:
        found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"{where} is no address of this machine: {error.strerror}") from None
    # Names often stand for both families; the older one is the one every client tries.
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    if not (have_keys or settings.allow_anonymous or ipaddress.ip_address(address[0]).is_loopback):
        raise ConfigError(
            f"{where} lets other machines in although there are no API keys. Name keys with server.api_keys_file or "
            "INTERLACE_SERVER__API_KEYS, listen on 127.0.0.1, or set server.allow_anonymous = true"
        )
    bound = socket.socket(family, kind, protocol)
    # So that a restart need not wait until the system has forgotten the connections of the process before.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason = f"port {settings.port} is in use by another process" if error.errno == 98 else error.strerror
        port = f"server.port = {settings.port} ({loaded.source('server.port')})"
        raise ConfigError(f"cannot listen: {reason} ({where}, {port}). server.port = 0 takes any free port") from None
    name = f"[{host}]" if ":" in host else host
    scheme = "https" if settings.tls_certificate else "http"
    return Listener(bound, f"{scheme}://{name}:{bound.getsockname()[1]}")


def _bind_unix(name: str, source: str) -> Listener:
    path, where = Path(name), f"server.unix_socket = '{name}' ({source})"
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path, where)
        before = os.umask(0o177)  # for this user only, from the first moment
        try:
            bound.bind(name)
        finally:
            os.umask(before)
    except (OSError, ConfigError) as error:
        bound.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} cannot be made: {error.strerror or error}") from None
    return Listener(bound, f"unix:{name}", path)


def _remove_stale(path: Path, where: str) -> None:
    """Remove the socket a killed server left behind; anything else in the place is left alone."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{where} exists and is no socket; it is not replaced")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"{where} is in use by another process")


def tls_context(loaded: LoadedSettings) -> ssl.SSLContext | None:
    """The TLS side of the settings, or None without. Raises `ConfigError` naming the setting and the file at fault."""
    settings = loaded.settings.server
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None:
        if key is not None:
            raise ConfigError(f"server.tls_key = '{key}' needs server.tls_certificate, the certificate it belongs to")
        return None
    _readable("server.tls_certificate", certificate, loaded)
    named = f"server.tls_certificate = '{certificate}' ({loaded.source('server.tls_certificate')})"
    if key is not None:
        _readable("server.tls_key", key, loaded)
        named += f" with server.tls_key = '{key}' ({loaded.source('server.tls_key')})"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password for encrypted keys OpenSSL would ask on the terminal and wait.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        raise ConfigError(f"{named} cannot be used: {_explain(error, key)}") from None
    return context


def _explain(error: ssl.SSLError, key: str | None) -> str:
    text = str(error).lower()
    if "mismatch" in text:
        return "the key does not belong to the certificate"
    if "bad decrypt" in text or "bad password" in text or "empty password" in text:
        return "the key is encrypted; store it without a passphrase"
    if key is None and "pem lib" in text:
        return "it holds no certificate with its key in PEM form; name the key with server.tls_key"
    return f"not a certificate and private key in PEM form ({error.reason or 'no reason given'})"


def _readable(setting: str, name: str, loaded: LoadedSettings) -> None:
    try:
        with open(name, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{setting} = '{name}' ({loaded.source(setting)}) cannot be read: {error.strerror}") from None
