"""An exception on its way between processes: as text, and rebuilt on the other side."""

from __future__ import annotations

import builtins
import traceback

import msgspec

from interlace import errors
from interlace.errors import EngineDeadError, InterlaceError


class RemoteError(msgspec.Struct, frozen=True):
    """An exception of another process, as text."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> RemoteError:
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)))

    def rebuild(self) -> Exception:
        """The same exception type with the same text where Interlace or Python define it, with the other process's
        traceback as its cause; otherwise `EngineDeadError`."""
        known = getattr(errors, self.type, None) or getattr(builtins, self.type, None)
        rebuilt: Exception
        try:
            if not (isinstance(known, type) and issubclass(known, Exception)):
                raise TypeError
            rebuilt = known(self.message)
            if str(rebuilt) != self.message:  # KeyError puts quotes round its text, again
                raise TypeError
        except TypeError:
            rebuilt = EngineDeadError(f"{self.type}: {self.message}")
        rebuilt.__cause__ = RemoteTraceback(f"\n{self.traceback}")
        return rebuilt


class RemoteTraceback(InterlaceError):
    """Carries the traceback text of another process; only ever the cause of another exception."""
