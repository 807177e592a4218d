"""`ServerState`: what every route is given. There is no global: two servers can live in one process."""

from __future__ import annotations

from typing import NamedTuple

from interlace.config.settings import ServerSettings
from interlace.engine.async_llm import AsyncLLM


class ServerState(NamedTuple):
    """One server. Each API family is a function `router(state) -> APIRouter` that closes over this."""

    llm: AsyncLLM
    """Started, and supervised: it survives the death of its engine process."""
    settings: ServerSettings
    model_names: tuple[str, ...]
    """Names clients may use, the first one in answers."""
    created: int
    """Unix time of the start, for `/v1/models`."""
