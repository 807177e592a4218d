"""What stops a batch. A bad line does not: it is answered with an error record."""

from __future__ import annotations

from interlace.errors import InterlaceError


class BatchError(InterlaceError):
    """The input cannot be read, or the output cannot be written or belongs to another input."""
