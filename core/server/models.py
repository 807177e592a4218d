"""What is served, and by which version."""

from __future__ import annotations

from fastapi import APIRouter

from interlace import __version__
from interlace.server.answers import Model, ModelList, Version
from interlace.server.generation import check_model
from interlace.server.routing import json_answer, returns
from interlace.server.state import ServerState


def router(state: ServerState) -> APIRouter:
    """`/v1/models`, `/v1/models/{name}` and `/version`."""
    routes = APIRouter(tags=["models"])

    def describe(name: str) -> Model:
        spec = state.llm.front.spec
        return Model(id=name, created=state.created, root=spec.model, max_model_len=spec.max_model_len)

    @routes.get("/v1/models", summary="List the models", responses=returns(ModelList))
    async def models() -> object:
        return json_answer(ModelList(data=[describe(name) for name in state.model_names]))

    @routes.get("/v1/models/{name:path}", summary="Describe a model", responses=returns(Model))
    async def model(name: str) -> object:
        check_model(state, name)
        return json_answer(describe(name))

    @routes.get("/version", summary="The version of Interlace", responses=returns(Version))
    async def version() -> object:
        return json_answer(Version(__version__))

    return routes
