"""From what a request calls its prompt to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from interlace.engine.front import Front
from interlace.errors import InvalidRequestError
from interlace.server.bodies import parse
from interlace.server.errors import ApiError
from interlace.server.requests import ChatMessage, ChatPrompt

MAX_ANSWERS = 1024
"""Answers (prompts times `n`) that one request may ask for."""
SURELY_SHORT = 16
"""Characters per token up to which a text is encoded without a closer look at its length."""
PART_TYPES = ("text", "input_text", "output_text")
OTHER_PARTS = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file")
ROLES = {"developer": "system"}
"""Names of roles that templates know under another name."""


def encode(front: Front, text: str, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of `text`. A text that must be too long is refused unread: reading it would hold up everyone else."""
    limit = front.spec.max_model_len
    if len(text) > limit * SURELY_SHORT:
        longest = max(map(len, front.tokenizer.backend.get_vocab()), default=1)
        if len(text) > limit * longest:
            raise InvalidRequestError(
                f"{param} has {len(text)} characters, more than fit into {limit} tokens (max_model_len)",
                param=param,
                code="context_length_exceeded",
            )
    return front.tokenizer.encode(text, add_special_tokens)


def encode_prompts(front: Front, prompt: Any, add_special_tokens: bool, n: int) -> list[list[int]]:
    """The `prompt` of a completion, for `n` answers each: a text, token ids, or a list of either."""
    prompts = _split(prompt)
    if len(prompts) * n > MAX_ANSWERS:
        raise ApiError(
            400, f"{len(prompts)} prompts times n = {n} is too much: at most {MAX_ANSWERS} answers", param="prompt"
        )
    limit = front.spec.max_model_len
    encoded = []
    for i, one in enumerate(prompts):
        param = "prompt" if one is prompt else f"prompt.{i}"
        if not one:
            raise ApiError(400, f"{param} is empty: give at least one character or token id", param=param)
        if isinstance(one, str):
            encoded.append(encode(front, one, add_special_tokens, param))
        elif len(one) >= limit:
            text = f"{param} has {len(one)} tokens; {limit - 1} are allowed (max_model_len = {limit})"
            raise ApiError(400, text, param=param, code="context_length_exceeded")
        else:
            encoded.append(one)
    return encoded


def _split(prompt: Any) -> Sequence[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [prompt]
        if all(isinstance(item, str) or _is_ids(item) for item in prompt):
            return prompt
    allowed = "a text, a list of token ids, or a list of either"
    raise ApiError(400, f"prompt must be {allowed}, and not empty", param="prompt", code="invalid_type")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def encode_chat(front: Front, chat: ChatPrompt) -> list[int]:
    """The conversation through the model's chat template."""
    messages = [_message(message, f"messages.{i}.") for i, message in enumerate(chat.messages)]
    variables = dict(chat.chat_template_kwargs or {})
    for name in ("messages", "add_generation_prompt"):
        if name in variables:
            param = f"chat_template_kwargs.{name}"
            raise ApiError(400, f"'{param}' is not allowed: give '{name}' in the request itself", param=param)
    if chat.documents is not None:
        variables["documents"] = chat.documents
    if chat.continue_final_message:
        if chat.add_generation_prompt and "add_generation_prompt" in chat.model_fields_set:
            text = "continue_final_message and add_generation_prompt exclude each other"
            raise ApiError(400, text, param="continue_final_message")
        text = _cut_after_last(front.tokenizer.render_chat(messages, False, **variables), messages)
    else:
        text = front.tokenizer.render_chat(messages, chat.add_generation_prompt, **variables)
    return encode(front, text, chat.add_special_tokens, "messages")


def _cut_after_last(text: str, messages: list[dict[str, Any]]) -> str:
    """`text` without what the template writes after the content of the last message."""
    content = messages[-1]["content"] if messages else ""
    for last in (content, content.strip()):
        end = text.rfind(last)
        if last.strip() and end >= 0:
            return text[: end + len(last)]
    raise ApiError(400, "there is no last message that could be continued", param="continue_final_message")


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """One message as templates want it: a role and a text. Raises `ApiError` for what is not text."""
    checked = parse(ChatMessage, message, where)
    if checked.role in ("tool", "function"):
        text = f"'{where}role' = '{checked.role}' is not supported by this server yet"
        raise ApiError(400, text, param=where + "role", code="unsupported_parameter")
    content = checked.content
    if content is None:
        raise ApiError(400, f"'{where}content' is missing", param=where + "content", code="missing_required_parameter")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}content.{i}.") for i, part in enumerate(content))
    extras = {name: value for name in ("name", "reasoning", "reasoning_content") if (value := getattr(checked, name))}
    return {"role": ROLES.get(checked.role, checked.role), "content": content, **extras}


def _part(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind in OTHER_PARTS:
        raise ApiError(
            400, f"'{where}type' = '{kind}' is not supported by this server yet (only 'text')",
            param=where + "type", code="unsupported_parameter",
        )  # fmt: skip
    text = part.get("text")
    if kind not in PART_TYPES or not isinstance(text, str):
        shown = msgspec.json.encode(kind).decode()[:80]
        raise ApiError(400, f"'{where}type' = {shown}: a part has the type 'text' and a 'text'", param=where + "type")
    return text
