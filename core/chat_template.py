"""Chat templates: from a list of messages to the text a model was trained on, in jinja's sandbox.

Follows the conventions that Hugging Face chat templates are written against: the variables `messages`, `tools`,
`documents`, `add_generation_prompt` and the special tokens; the helpers `raise_exception`, `strftime_now` and
`tojson`; `break` and `continue`; blocks trimmed on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from interlace.clock import local_time
from interlace.errors import InvalidRequestError

_PLAIN = (str, int, float, bool, type(None))


class ChatTemplate:
    """One template. Compiled at the first use; rendering is thread-safe and cannot touch the caller's messages."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = local_time,
        model: str = "the model",
    ) -> None:
        """`special_tokens`: variables such as `bos_token`. `now` serves `strftime_now`. `model` is for errors."""
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.now = now
        self.model = model

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt text. `extra` are further template variables, e.g. `tools` or `enable_thinking`.

        Raises `InvalidRequestError` when the template refuses the messages or is itself wrong."""
        variables = {"tools": None, "documents": None, **self.special_tokens, **_plain(extra, "chat template variable")}
        conversation = check_messages(messages)
        try:
            return str(
                self._compiled.render(
                    variables, messages=conversation, add_generation_prompt=bool(add_generation_prompt)
                )
            )
        except InvalidRequestError:
            raise
        except Exception as error:  # a template is foreign code: it may fail in any way
            raise InvalidRequestError(
                f"the chat template of {self.model} cannot render these {len(conversation)} messages: "
                f"{type(error).__name__}: {error}"
            ) from error

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """`{% generation %}` marks what the assistant wrote, for training; here it is only its body."""

            tags = {"generation"}  # noqa: RUF012  (the type jinja declares)

            def parse(self, parser: Parser) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: self.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except TemplateError as error:
            line = f" (line {number})" if (number := getattr(error, "lineno", None)) else ""
            raise InvalidRequestError(
                f"the chat template of {self.model} is not a valid jinja template{line}: {error}. "
                "Give a correct one with `--chat-template FILE`, or send completion-style prompts."
            ) from error


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A plain-data copy of a conversation. Raises `InvalidRequestError` naming the message that is wrong."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages must be a list of {{'role': …, 'content': …}} objects, not {type(messages).__name__}"
        )
    if not messages:
        raise InvalidRequestError("messages is empty: at least one message is needed")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"messages[{index}] must be an object, not {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{index}] needs a 'role' such as 'user', 'assistant' or 'system'")
        if "content" not in message and "tool_calls" not in message:
            raise InvalidRequestError(f"messages[{index}] (role '{message['role']}') needs 'content'")
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON types only: a template must not reach the methods of richer objects."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise InvalidRequestError(f"{where} is of type {type(value).__name__}; only JSON types are allowed")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
