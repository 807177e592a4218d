"""`SubprocessClient`: the engine in a child process, so that a busy front does not slow its steps."""

from __future__ import annotations

from interlace.engine.local_link import LocalLink
from interlace.engine.process_client import ProcessClient
from interlace.spec import ResolvedSpec


class SubprocessClient(ProcessClient):
    """A `ProcessClient` whose engine runs beside the front."""

    def __init__(self, spec: ResolvedSpec) -> None:
        self._process = LocalLink()
        super().__init__(spec, self._process)

    @property
    def returncode(self) -> int | None:
        """How the process ended, as of `subprocess.Popen`; None while it runs."""
        return self._process.returncode
