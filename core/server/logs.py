"""The server's log: text or JSON lines, on stderr and in a file, written by a thread of its own.

Whoever logs never waits: a full disk, a slow one, or a pipe that nobody reads costs log lines, which are counted, and
nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from interlace.config import LoadedSettings
from interlace.errors import ConfigError

MAX_PENDING = 10_000
"""Lines that may wait to be written; more are dropped and counted."""
STOP_TIMEOUT = 2.0
CHILD_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) (\S+) \(engine\): (.*)", re.DOTALL)
"""What `interlace.engine.subprocess_main` writes."""


class ServerLog:
    """Takes over this process's logging while it is open; `close` writes what is left and gives stderr back."""

    def __init__(self, loaded: LoadedSettings) -> None:
        """Raises `ConfigError` when `server.log_file` cannot be opened."""
        settings = loaded.settings.server
        self._file = None
        if settings.log_file is not None:
            self._file = _LogFile(settings.log_file, loaded.source("server.log_file"))
        structured = settings.log_format == "json"
        # Lines of the engine process and of native libraries go to file descriptor 2 directly. Where the log is more
        # than a terminal's text, they are led through this process.
        self._captured = _CapturedStderr() if structured or self._file else None
        terminal = self._captured.original if self._captured else 2
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_PENDING)
        self._dropped = 0
        self._writer = threading.Thread(target=self._write, args=(terminal,), name="interlace-log", daemon=True)
        self._writer.start()
        handler = _LineHandler(self._put)
        handler.setFormatter(JsonFormatter() if structured else TextFormatter())
        root = logging.getLogger()
        self._before = root.handlers[:], root.level
        root.handlers[:] = [handler]
        root.setLevel(logging.WARNING)
        logging.getLogger("interlace").setLevel(logging.INFO)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        logging.captureWarnings(True)

    def close(self) -> None:
        """Write what is left, for at most a few seconds. May be called twice."""
        if self._captured is not None:
            self._captured.close()
            self._captured = None
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=STOP_TIMEOUT)
        self._writer.join(STOP_TIMEOUT)
        root = logging.getLogger()
        root.handlers[:], level = self._before
        root.setLevel(level)
        logging.captureWarnings(False)

    def _put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def _write(self, terminal: int) -> None:
        while (line := self._lines.get()) is not None:
            lines = [line]
            with contextlib.suppress(queue.Empty):
                while len(lines) < 1000 and (line := self._lines.get_nowait()) is not None:
                    lines.append(line)
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                self._say(f"{dropped} lines of the log were dropped: they came faster than they could be written")
            data = "".join(lines).encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError):
                _write_all(terminal, data)
            if self._file is not None:
                self._file.write(data, self._say)
            if line is None:
                return

    @staticmethod
    def _say(text: str) -> None:
        """Something about the log itself, in the log."""
        logging.getLogger("interlace.server").error("%s", text)


class TextFormatter(logging.Formatter):
    """`2026-11-23 09:30:00,123 INFO interlace.server: …`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time` (UTC), `level`, `logger`, `message`, `error` (a traceback), and what else the
    record has under `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class _LineHandler(logging.Handler):
    def __init__(self, put: Callable[[str], None]) -> None:
        super().__init__()
        self._put_line = put

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._put_line(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


class _LogFile:
    """A file that may be full, vanish, or be rotated away, and then is opened anew."""

    def __init__(self, path: str, source: str) -> None:
        self._path = path
        self._errors = 0
        try:
            self._descriptor: int | None = _open(path)
        except OSError as error:
            message = f"server.log_file = '{path}' ({source}) cannot be opened: {error.strerror}"
            raise ConfigError(message) from None

    def write(self, data: bytes, report: Callable[[str], None]) -> None:
        """Write whole lines. The first failure, and the end of a series of them, are reported; others are counted."""
        try:
            if self._descriptor is None or not self._is_current():
                self._reopen()
            assert self._descriptor is not None
            _write_all(self._descriptor, data)
        except OSError as error:
            self._errors += 1
            if self._errors == 1:
                report(f"the log file '{self._path}' cannot be written: {error.strerror}; serving goes on without it")
        else:
            if self._errors:
                errors, self._errors = self._errors, 0
                report(f"the log file '{self._path}' can be written again, after {errors} failed writes")

    def _is_current(self) -> bool:
        assert self._descriptor is not None
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def _reopen(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._descriptor = _open(self._path)


class _CapturedStderr:
    """File descriptor 2 as a pipe into the log: the engine process inherits it."""

    def __init__(self) -> None:
        self.original = os.dup(2)
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        self._thread = threading.Thread(target=self._read, args=(reading,), name="interlace-stderr", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.dup2(self.original, 2)  # the pipe ends here, and with it, once the engine process is gone, the thread
        self._thread.join(STOP_TIMEOUT)

    def _read(self, reading: int) -> None:
        with open(reading, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                found = CHILD_LINE.match(line.rstrip("\n"))
                level, name, text = found.groups() if found else ("INFO", "stderr", line.rstrip("\n"))
                # Past the levels of loggers: whoever wrote the line has decided already that it is worth it.
                record = logging.LogRecord(name, getattr(logging, level), "", 0, "%s", (text,), None)
                for handler in logging.getLogger().handlers:
                    handler.handle(record)


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)


def _write_all(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    while written < len(data):
        more = os.write(descriptor, data[written:])
        if not more:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += more
