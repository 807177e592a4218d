"""`create_app`: the routes of one server. What requests must pass before they get here is `interlace.server.guard`."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request

from interlace import __version__
from interlace.server import docs_page, errors, health, live, models, tokenization, tracing
from interlace.server.answers import ChatChunk, ChatCompletion, Completion
from interlace.server.chat import ChatService
from interlace.server.completions import CompletionService
from interlace.server.metrics import routes as metrics
from interlace.server.requests import ChatRequest, CompletionRequest
from interlace.server.routing import describe_schemas, respond, returns, takes
from interlace.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The application over a started engine. It keeps no state beside `state`."""
    settings = state.settings
    app = FastAPI(
        title="Interlace",
        version=__version__,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        root_path=settings.root_path,
    )
    app.include_router(generation_router(state))
    for family in (models, tokenization, health):
        app.include_router(family.router(state))
    if settings.metrics:
        metrics.install(app, state)
    if settings.page:
        live.install(app, state)
    tracing.install(app, state)
    if settings.docs:
        app.include_router(docs_page.router(app))
    errors.install(app)
    describe_schemas(app)
    return app


def generation_router(state: ServerState) -> APIRouter:
    """`/v1/chat/completions` and `/v1/completions`."""
    routes = APIRouter(tags=["generation"], prefix="/v1")
    chats, completions = ChatService(state), CompletionService(state)

    @routes.post(
        "/chat/completions",
        summary="Answer a conversation",
        openapi_extra=takes(ChatRequest),
        responses=returns(ChatCompletion, ChatChunk),
    )
    async def chat_completions(request: Request) -> object:
        return await respond(state, chats, request)

    @routes.post(
        "/completions",
        summary="Continue prompts",
        openapi_extra=takes(CompletionRequest),
        responses=returns(Completion, Completion),
    )
    async def create_completions(request: Request) -> object:
        return await respond(state, completions, request)

    return routes
