"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from interlace.engine.detokenizer import Detokenizer
from interlace.errors import InvalidRequestError
from interlace.server.answers import Text, Tokens
from interlace.server.bodies import parse, read_json
from interlace.server.generation import check_model
from interlace.server.prompts import encode, encode_chat
from interlace.server.requests import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from interlace.server.routing import json_answer, returns, takes
from interlace.server.state import ServerState


def router(state: ServerState) -> APIRouter:
    """Text to tokens and back, as the model sees them."""
    routes = APIRouter(tags=["tokens"])
    detokenizer = Detokenizer(state.llm.front.tokenizer)

    @routes.post(
        "/tokenize",
        summary="Tokenize a text or a conversation",
        openapi_extra=takes(TokenizeRequest, TokenizeChatRequest),
        responses=returns(Tokens),
    )
    async def tokenize(request: Request) -> object:
        body = await read_json(request)
        front = state.llm.front
        if isinstance(body, dict) and "messages" in body:
            chat = parse(TokenizeChatRequest, body)
            check_model(state, chat.model)
            with_texts, ids = chat.return_token_strs, encode_chat(front, chat)
        else:
            text = parse(TokenizeRequest, body)
            check_model(state, text.model)
            with_texts, ids = text.return_token_strs, encode(front, text.prompt, text.add_special_tokens, "prompt")
        texts = [detokenizer.token_text(token) for token in ids] if with_texts else None
        return json_answer(Tokens(len(ids), front.spec.max_model_len, ids, texts))

    @routes.post(
        "/detokenize",
        summary="The text of tokens",
        openapi_extra=takes(DetokenizeRequest),
        responses=returns(Text),
    )
    async def detokenize(request: Request) -> object:
        wanted = parse(DetokenizeRequest, await read_json(request))
        check_model(state, wanted.model)
        front = state.llm.front
        size = front.spec.model_config.vocab_size
        for i, token in enumerate(wanted.tokens):
            if not 0 <= token < size:
                text = f"tokens.{i} = {token} is outside the vocabulary: ids go from 0 to {size - 1}"
                raise InvalidRequestError(text, param=f"tokens.{i}")
        return json_answer(Text(front.tokenizer.decode(wanted.tokens, wanted.skip_special_tokens)))

    return routes
