"""Lines answered by an engine, through the same services as the HTTP API: same checks, same answers, same errors."""

from __future__ import annotations

import asyncio
import logging

from interlace.batch.journal import BatchResponse, record_id
from interlace.batch.lines import BatchLine
from interlace.batch.runner import Answer
from interlace.clock import local_time
from interlace.engine.async_llm import AsyncLLM
from interlace.errors import EngineDeadError, EngineRestartingError
from interlace.server.chat import ChatService
from interlace.server.completions import CompletionService
from interlace.server.errors import ApiError, describe
from interlace.server.generation import Caller
from interlace.server.serve import model_names
from interlace.server.state import ServerState

logger = logging.getLogger(__name__)


def engine_answer(llm: AsyncLLM) -> Answer:
    """What answers lines with a started engine.

    A line that fails is answered with the status and the error object that the HTTP API gives. Only a dead engine is
    raised (`EngineDeadError`); while one is being started again, lines wait for it, and those it took down are answered
    anew. A line may wait for as long as it takes, unless `server.request_timeout_s` is set by hand."""
    settings = llm.loaded.settings.server
    if llm.loaded.source("server.request_timeout_s") == "default":
        settings = settings.model_copy(update={"request_timeout_s": 0.0})
    state = ServerState(llm, settings, model_names(llm.loaded), created=int(local_time().timestamp()))
    services: dict[str, ChatService | CompletionService] = {
        "/v1/chat/completions": ChatService(state),
        "/v1/completions": CompletionService(state),
    }

    async def answer(line: BatchLine) -> BatchResponse:
        request_id = record_id(line.number)
        try:
            if line.body.get("stream"):
                raise ApiError(400, "stream is not possible in a batch: leave it out", param="stream")
            body = await services[line.url].respond(line.body, Caller(request_id))
            return BatchResponse(status_code=200, request_id=request_id, body=body)
        except EngineRestartingError as error:
            await asyncio.sleep(error.retry_after)
            return await answer(line)
        except EngineDeadError:
            raise
        except Exception as error:
            # Also one that is a bug of ours: a line that always meets it must not keep the others from being answered.
            found = describe(error)
            if found.status == 500:
                logger.exception("line %d failed", line.number)
            return BatchResponse(status_code=found.status, request_id=request_id, body=found.content)

    return answer
