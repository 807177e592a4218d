"""Addresses, keys and certificates are judged before anything is loaded."""

import os
import socket
import ssl
import stat

import pytest

from interlace.config import load_settings
from interlace.errors import ConfigError
from interlace.server.auth import ApiKeys, read_keys
from interlace.server.listen import bind, tls_context
from interlace.server.serve import model_names


def loaded(**server):
    return load_settings({"server": {"port": 0} | server}, env={})


def refuse(action, **server):
    with pytest.raises(ConfigError) as caught:
        action(loaded(**server))
    return str(caught.value)


def take(settings, have_keys=False):
    return bind(settings, have_keys=have_keys)


def test_a_free_port_is_taken_and_named():
    listener = take(loaded())
    assert listener.url == f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
    listener.listen()
    with socket.create_connection(listener.socket.getsockname()):
        pass
    listener.close()
    listener.close()


def test_a_port_in_use_is_said_with_its_setting():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = refuse(take, port=port)
    assert f"port {port} is in use by another process" in message
    assert f"server.port = {port} (constructor)" in message


def test_two_that_start_at_once_do_not_share_a_port():
    first = take(loaded())
    try:
        second = take(loaded(port=first.socket.getsockname()[1]))
    except ConfigError:
        first.close()
        return
    first.listen()
    with pytest.raises(ConfigError, match="cannot listen"):
        second.listen()
    first.close()
    second.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_let_in_only_with_keys_or_on_purpose(host):
    message = refuse(take, host=host)
    assert f"server.host = '{host}'" in message
    assert "server.api_keys_file" in message
    assert "server.allow_anonymous" in message
    take(loaded(host=host), have_keys=True).close()
    take(loaded(host=host, allow_anonymous=True)).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8", "::1"])
def test_loopback_needs_no_keys(host):
    listener = take(loaded(host=host))
    assert listener.url.startswith("http://[::1]:" if host == "::1" else f"http://{host}:")
    listener.close()


def test_an_unknown_host_is_said():
    assert "server.host = 'no such host'" in refuse(take, host="no such host")


def test_a_unix_socket_is_for_its_user_and_goes_with_the_server(tmp_path):
    path = tmp_path / "socket"
    listener = take(loaded(unix_socket=str(path)))
    assert listener.url == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()
    assert not path.exists()


def test_the_socket_of_a_killed_server_is_replaced_and_a_living_one_is_not(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first = take(loaded(unix_socket=str(path)))
    first.listen()
    assert "is in use by another process" in refuse(take, unix_socket=str(path))
    assert path.exists()
    first.close()


def test_other_files_are_not_replaced_by_a_socket(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert "exists and is no socket" in refuse(take, unix_socket=str(path))
    assert path.read_text() == "mine"
    assert "cannot be made" in refuse(take, unix_socket=str(tmp_path / "missing" / "socket"))
    assert "cannot be made" in refuse(take, unix_socket=str(tmp_path / ("x" * 200)))


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────


def presents(key):
    return [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode())]


def test_keys_come_from_settings_and_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# for the page\nsk-from-file-1\n\n  sk-from-file-2  \n")
    keys = read_keys(loaded(api_keys=["sk-from-settings"], api_keys_file=str(path)))
    assert len(keys) == 3
    for key in ("sk-from-settings", "sk-from-file-1", "sk-from-file-2"):
        assert keys.check(presents(key))
    assert keys.check(presents("# for the page")) is None
    assert keys.check([]) is None
    assert keys.check(presents("")) is None


def test_keys_come_from_the_environment():
    keys = read_keys(load_settings(env={"INTERLACE_SERVER__API_KEYS": "sk-one-12345,sk-two-12345"}))
    assert len(keys) == 2


def test_bad_keys_are_located_and_not_shown(tmp_path):
    assert "server.api_keys[1] (constructor)" in refuse(read_keys, api_keys=["sk-good-long", "short"])
    path = tmp_path / "keys"
    path.write_text("sk-good-long\nsk with blanks\n")
    message = refuse(read_keys, api_keys_file=str(path))
    assert f"'{path}' (constructor), line 2" in message
    assert "blanks\n" not in message
    assert "sk with" not in message
    path.write_text("# nothing\n")
    assert "holds no key" in refuse(read_keys, api_keys_file=str(path))
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refuse(read_keys, api_keys_file=str(path))
    assert "cannot be read: No such file" in refuse(read_keys, api_keys_file=str(tmp_path / "none"))


def test_keys_are_not_kept():
    assert "sk-secret-key" not in repr(vars(ApiKeys(["sk-secret-key"])))


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_certificate_with_its_key_is_loaded(tmp_path, make_certificate):
    certificate, key = make_certificate(tmp_path)
    settings = loaded(tls_certificate=str(certificate), tls_key=str(key))
    assert isinstance(tls_context(settings), ssl.SSLContext)
    listener = take(settings)
    assert listener.url.startswith("https://")
    listener.close()
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    assert tls_context(loaded(tls_certificate=str(both))) is not None
    assert tls_context(loaded()) is None


def test_faulty_certificates_are_said_with_setting_and_file(tmp_path, make_certificate):
    certificate, key = map(str, make_certificate(tmp_path))
    _, foreign = map(str, make_certificate(tmp_path, "other"))
    _, locked = map(str, make_certificate(tmp_path, "locked", b"secret"))
    noise = tmp_path / "noise.pem"
    noise.write_text("not a certificate")
    missing = str(tmp_path / "missing.pem")
    for settings, fault in (
        ({"tls_certificate": missing}, f"server.tls_certificate = '{missing}' (constructor) cannot be read: No such"),
        ({"tls_certificate": certificate, "tls_key": missing}, f"server.tls_key = '{missing}' (constructor) cannot"),
        ({"tls_certificate": certificate, "tls_key": foreign}, "does not belong to the certificate"),
        ({"tls_certificate": certificate, "tls_key": str(noise)}, "not a certificate and private key in PEM form"),
        ({"tls_certificate": str(noise), "tls_key": key}, "not a certificate and private key in PEM form"),
        ({"tls_certificate": certificate}, "server.tls_key"),
        ({"tls_key": key}, "needs server.tls_certificate"),
        ({"tls_certificate": certificate, "tls_key": str(tmp_path)}, "cannot be read: Is a directory"),
    ):
        message = refuse(tls_context, **settings)
        assert fault in message, message
        assert any(value in message for value in settings.values())
    message = refuse(tls_context, tls_certificate=certificate, tls_key=locked)
    assert "encrypted" in message or "PEM form" in message


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_of_the_model(tmp_path):
    assert model_names(loaded()) == ("smollm2",)
    assert model_names(loaded(served_model_names=["a", "b", "a"])) == ("a", "b")
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert model_names(load_settings({"model": f"{folder}{os.sep}"}, env={})) == ("my-model",)
    assert "server.served_model_names" in refuse(model_names, served_model_names=["a", " "])


def test_a_share_is_no_size_of_a_body():
    with pytest.raises(ConfigError, match="not a share"):
        loaded(max_body_size="0.5")
