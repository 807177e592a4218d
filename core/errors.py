"""Every error Interlace raises on purpose.

A message says what was wrong, where (file, key, value), what is allowed, the nearest match, and how to fix it.
`InterlaceError` is the common base: catching it catches everything a user can cause; anything else is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The entry of `choices` most like `word`, or None when nothing is close."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence to append to an error: `` Did you mean 'x'?`` or nothing."""
    found = nearest(word, choices)
    return f" Did you mean '{found}'?" if found else ""


class InterlaceError(Exception):
    """Base of all errors that a user, an operator or a plugin can cause."""


class ConfigError(InterlaceError):
    """A setting is unknown, misspelt, of the wrong type or out of range."""


class ModelNotFoundError(InterlaceError):
    """No checkpoint is found under the given name, path or hub id."""


class CheckpointError(InterlaceError):
    """A checkpoint is corrupt, truncated, incomplete, or of an unknown form."""


class CapacityError(InterlaceError):
    """The KV cache cannot hold what is asked of it; says needed, available and the key to change."""


class InvalidRequestError(InterlaceError, ValueError):
    """A request that can never run as written: bad prompt or bad sampling parameters. The engine is unharmed."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """The field at fault, where there is one."""
        self.code = code
        """A word for programs, e.g. `context_length_exceeded`."""


class RequestFailedError(InterlaceError):
    """A request was accepted and then failed (capacity, a failed step, its deadline, rejection by the policy)."""

    def __init__(self, message: str, code: str = "error") -> None:
        super().__init__(message)
        self.code = code


class OverloadedError(InterlaceError):
    """The engine's queue is full: the request was not accepted, and may be sent again later."""


class EngineDeadError(InterlaceError):
    """The engine stopped; its own exception is chained as the cause."""


class EngineSilentError(EngineDeadError):
    """The engine loop did not answer in time; it may be in a long step, or hung."""


class EngineRestartingError(EngineDeadError):
    """The engine process died, with every request it had, and a new one is being started: try again later.

    Both the requests that died with it and those that come meanwhile get this error. The engine's exception, where it
    could still say it, is chained as the cause."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds until the new engine may be ready: the time the last start took, never less than one."""


class PluginError(InterlaceError):
    """Base of the five things that can be wrong with a plugin."""


class PluginNotFoundError(PluginError):
    """No provider of that kind has that name."""


class PluginConflictError(PluginError):
    """Two packages provide the same name; neither wins silently."""


class PluginImportError(PluginError):
    """The selected provider's code cannot be imported; the cause is chained."""


class PluginContractError(PluginError):
    """The provider speaks another contract version, or its class lacks methods of the contract."""


class PluginOptionsError(PluginError, ConfigError):
    """The options given for a plugin do not fit its Options model."""
