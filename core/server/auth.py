"""API keys: which ones there are, and whether a request presents one of them."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from interlace.config import LoadedSettings
from interlace.errors import ConfigError

MIN_KEY_LENGTH = 8
"""Shorter keys are guessed too easily, and are more often a mistake in the file than a key."""


class ApiKeys:
    """The digests of the keys clients may present; the keys themselves are not kept."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, headers: list[tuple[bytes, bytes]]) -> str | None:
        """A salt that stands for the key in `Authorization: Bearer KEY`, or None if there is no such key.

        The time it takes does not depend on which key it is, nor on how much of one was guessed: digests of equal
        length are compared, all of them, each in constant time. `headers` are as in an ASGI scope."""
        digest = _digest(_presented(headers))
        known = False
        for candidate in self._digests:
            known |= hmac.compare_digest(candidate, digest)
        return hashlib.sha256(b"interlace cache salt" + digest).hexdigest() if known else None


def read_keys(loaded: LoadedSettings) -> ApiKeys:
    """The keys of `server.api_keys` and of the file `server.api_keys_file` names.

    Raises `ConfigError` that says where the fault is and never what the key is."""
    settings = loaded.settings.server
    keys = []
    for place, secret in enumerate(settings.api_keys):
        where = f"server.api_keys[{place}] ({loaded.source('server.api_keys')})"
        keys.append(_checked(secret.get_secret_value(), where))
    if settings.api_keys_file is not None:
        keys += _read_file(settings.api_keys_file, loaded.source("server.api_keys_file"))
    return ApiKeys(keys)


def _read_file(name: str, source: str) -> list[str]:
    where = f"server.api_keys_file = '{name}' ({source})"
    try:
        lines = Path(name).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{where} cannot be read: {reason}") from None
    stripped = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    keys = [_checked(key, f"{where}, line {number}") for number, key in stripped if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"{where} holds no key: write one per line, or remove the setting")
    return keys


def _checked(key: str, where: str) -> str:
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not all(33 <= ord(char) <= 126 for char in key):
        raise ConfigError(
            f"{where} is not usable as a key: it should have at least {MIN_KEY_LENGTH} characters, "
            "ASCII letters, digits and punctuation without blanks"
        )
    return key


def _presented(headers: list[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
