"""The output of a batch, which is also the record of what is done: append-only, and sound after a kill at any moment.

A record is one line, appended with one write, so a kill leaves whole lines and at most one torn line at the end, which
the next start cuts off. The `id` of a record is made of the number of its input line, so it tells which lines are done
even where they have no `custom_id`. fsync bounds what a power cut may undo; what it undid is simply answered again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from interlace.batch.errors import BatchError

ID_PREFIX = "batch_req_"
_READ_SIZE = 1 << 20


class BatchResponse(msgspec.Struct, kw_only=True):
    """What the API answered."""

    status_code: int
    request_id: str
    body: Any


class BatchFailure(msgspec.Struct, kw_only=True):
    """Why a line was not even a request."""

    code: str
    message: str


class BatchRecord(msgspec.Struct, kw_only=True):
    """One line of the output: a response, or the reason why there is none."""

    id: str
    custom_id: str | None
    response: BatchResponse | None
    error: BatchFailure | None

    @property
    def failed(self) -> bool:
        """Whether the line has no good answer."""
        return _failed(self)


class _Known(msgspec.Struct):
    """As much of a record as recovery looks at."""

    id: str
    custom_id: str | None
    response: _KnownResponse | None
    error: BatchFailure | None


class _KnownResponse(msgspec.Struct):
    status_code: int


def _failed(record: BatchRecord | _Known) -> bool:
    return record.error is not None or record.response is None or record.response.status_code != 200


def record_id(number: int) -> str:
    """The `id` of the record of input line `number`."""
    return f"{ID_PREFIX}{number}"


class Journal:
    """An output file, opened for one run. No other run can open it meanwhile. A context manager."""

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        """Open or create `path`, cut off a torn last line, and learn which lines are done. With `retry_failed`, records
        of failed lines are taken out first.

        Raises `BatchError` if it is no regular file, no output of a batch, in use, or cannot be written."""
        self.path = path
        self.done = 0
        """Lines with a record."""
        self.failed = 0
        """Those of them without a good answer."""
        self.repaired = 0
        """Bytes cut off the end."""
        # Per input line: 0, or a check of its custom_id, which betrays an input that is not the one answered before.
        self._checks = array("L")
        self._syncing = threading.Lock()  # a descriptor must not be closed under fsync
        self._closed = False
        self._size = 0  # up to the end of the last whole record
        self._fd = _open_locked(path)
        try:
            self._recover(retry_failed)
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, OSError):
                raise self._broken(error) from error
            raise

    @property
    def last_done(self) -> int:
        """Number of the last input line that has a record, 0 if there is none."""
        return next((place for place in range(len(self._checks) - 1, 0, -1) if self._checks[place]), 0)

    def is_done(self, number: int, custom_id: str | None) -> bool:
        """Whether an input line has its record. Raises `BatchError` if that record is of another `custom_id`."""
        known = self._checks[number] if number < len(self._checks) else 0
        if known and known != _check(custom_id):
            raise BatchError(
                f"{self.path} holds the answer to another line {number} (the input has custom_id {custom_id!r} there): "
                "it belongs to another input file, or this one was changed. Choose another output, or restore the input"
            )
        return bool(known)

    def append(self, record: BatchRecord) -> None:
        """Write one record. Raises `BatchError` if it cannot be written; nothing of it is left then."""
        data = memoryview(msgspec.json.encode(record) + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            # What could be written of it is cut off again; should that fail, too, the next start does it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise self._broken(error) from error
        self._size = os.lseek(self._fd, 0, os.SEEK_END)
        self._remember(_number_of(record.id), record.custom_id, record.failed)

    def sync(self) -> None:
        """Bring all records to the disk. May be called in another thread. Raises `BatchError`."""
        with self._syncing:
            if self._closed:
                return
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise self._broken(error) from error

    def close(self) -> None:
        """Bring all records to the disk and let the file go."""
        try:
            self.sync()
        finally:
            with self._syncing:
                self._closed = True
                os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _broken(self, error: OSError) -> BatchError:
        return BatchError(
            f"{self.path} cannot be written: {error.strerror or error}. The {self.done} lines answered so far are in "
            "it; the same command goes on from there once it can be written"
        )

    # ── Recovery ────────────────────────────────────────────────────────────────────────────────────────────────

    def _recover(self, retry_failed: bool) -> None:
        self._size = 0
        failures = False
        for known, end in self._known():
            self._remember(_number_of(known.id), known.custom_id, _failed(known))
            self._size = end
            failures |= _failed(known)
        total = os.fstat(self._fd).st_size
        self.repaired = total - self._size
        if self.repaired:
            os.ftruncate(self._fd, self._size)
        if retry_failed and failures:
            self._drop_failures()

    def _known(self) -> Iterator[tuple[_Known, int]]:
        """(record, offset of its end) of all whole records. Lines that cannot be read are torn if they are the last
        ones; in between they are an error."""
        decoder = msgspec.json.Decoder(_Known)
        torn: str | None = None
        for place, (line, end) in enumerate(_whole_lines(self._fd), start=1):
            try:
                known = decoder.decode(line)
                _number_of(known.id)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                torn = torn or f"{self.path}, line {place}: this is no record of a batch ({error})"
                if place == 1:
                    raise BatchError(f"{torn}. Choose another output file") from error
                continue
            if torn is not None:
                raise BatchError(f"{torn}, and good records follow it. Remove that line, and it is answered again")
            yield known, end

    def _remember(self, number: int, custom_id: str | None, failed: bool) -> None:
        if number >= len(self._checks):
            self._checks.extend([0] * (number + 1024 - len(self._checks)))
        if self._checks[number]:
            raise BatchError(f"{self.path}: there are two records of input line {number} ({record_id(number)})")
        self._checks[number] = _check(custom_id)
        self.done += 1
        self.failed += failed

    def _drop_failures(self) -> None:
        """Replace the file by one without the failed records, all at once: a kill leaves the one or the other."""
        fresh = self.path.with_name(self.path.name + ".retry")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            decoder = msgspec.json.Decoder(_Known)
            for line, _ in _whole_lines(self._fd):
                if not _failed(decoder.decode(line)):
                    data = memoryview(line)
                    while data:
                        data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
            os.replace(fresh, self.path)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(self._fd)
        self._fd = descriptor
        self._checks = array("L")
        self.done = self.failed = 0
        self._recover(retry_failed=False)


def _open_locked(path: Path) -> int:
    """A descriptor of `path` that appends, locked against other runs."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise BatchError(f"{path} cannot be written: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BatchError(f"{path} is no regular file: the output must be one, to go on after a kill")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise BatchError(f"{path} is being written by another batch") from error
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another run has just replaced the file: open the new one


def _whole_lines(descriptor: int) -> Iterator[tuple[bytes, int]]:
    """(line with its newline, offset of its end) of every line that has a newline."""
    rest, offset, position = b"", 0, 0
    while data := os.pread(descriptor, _READ_SIZE, position):
        position += len(data)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            offset += len(line) + 1
            yield line + b"\n", offset


def _number_of(identity: str) -> int:
    """The input line that a record's `id` names. Raises ValueError of an `id` that is not ours."""
    prefix, _, digits = identity.rpartition("_")
    if f"{prefix}_" != ID_PREFIX or not (digits.isascii() and digits.isdigit()) or int(digits) < 1:
        raise ValueError(f"its id {identity!r} is not of the form {ID_PREFIX}LINE")
    return int(digits)


def _check(custom_id: str | None) -> int:
    """A number above 0 that two ids rarely share."""
    return 1 if custom_id is None else (zlib.crc32(custom_id.encode("utf-8", "surrogatepass")) << 1 | 1)
