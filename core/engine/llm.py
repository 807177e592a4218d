"""`LLM`: the offline API. Give it prompts, get whole answers, in the order of the prompts."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from interlace.clock import Clock
from interlace.config import LoadedSettings, load_settings
from interlace.engine.front import Front
from interlace.engine.input_processor import Message, PreparedRequest, Prompt, RequestOptions
from interlace.engine.output_state import ActiveRequest
from interlace.errors import InvalidRequestError
from interlace.messages import RequestOutput, SamplingParams

REFRESH_S = 0.1
"""Between two updates of the progress bar."""


class LLM:
    """A model ready to generate.

        with LLM("smollm2") as llm:
            print(llm.generate("The capital of France is")[0].outputs[0].text)

    Thread-safe: calls of `generate` from several threads share the batches of one engine.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        config: str | Path | None = None,
        plugins: Sequence[Any] | Mapping[str, Any] = (),
        **settings: Any,
    ) -> None:
        """Start an engine.

        `config` is a TOML or YAML file. `settings` are any settings, as nested dicts (`scheduler={"use": "fcfs"}`) or
        dotted keys (`**{"scheduler.use": "fcfs"}`), and win over every other source. `plugins` are plugin objects to
        register beside the installed ones, or, as a mapping, the settings of that name.
        Raises `ConfigError`, `PluginError`, `ModelNotFoundError`, `CheckpointError` or `CapacityError`."""
        loaded, objects = load_constructor(model, config, plugins, settings)
        self._attach(Front.open(loaded, plugins=objects))

    @classmethod
    def from_loaded(cls, loaded: LoadedSettings, *, plugins: Sequence[Any] = (), clock: Clock | None = None) -> Self:
        """An engine for settings that are already loaded."""
        return cls.from_front(Front.open(loaded, plugins=plugins, clock=clock))

    @classmethod
    def from_front(cls, front: Front) -> Self:
        """Over a front that is already started; `close` shuts it down."""
        llm = cls.__new__(cls)
        llm._attach(front)
        return llm

    def _attach(self, front: Front) -> None:
        self.front = front
        # Also runs when the object is collected or the interpreter exits.
        self._finalizer = weakref.finalize(self, front.shutdown)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        priority: int | Sequence[int] = 0,
        progress: bool = True,
        *,
        timeout: float | None = None,
        cache_salt: str | None = None,
        labels: dict[str, str] | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or many; the results are in the order of the prompts.

        A prompt is a text, token ids, chat messages, or a mapping (`{"prompt_token_ids": [...]}`). `params` and
        `priority` (lower runs earlier) are one for all or one per prompt. `timeout` is in seconds. `progress` shows a
        bar on a terminal's stderr.

        All prompts are validated before any is started: `InvalidRequestError` names the prompt. A request that fails
        later has `finish_reason` "error" and `.error`, and does not hurt the others. Raises `EngineDeadError`. On
        Ctrl-C the outstanding requests are aborted and the engine stays usable.
        """
        options = RequestOptions(timeout=timeout, cache_salt=cache_salt, labels=labels or {})
        prepared = self._prepare(prompts, params, priority, options, chat_options)
        inbox = _Inbox()
        requests: list[ActiveRequest] = []
        try:
            requests = self.front.submit(prepared, inbox, streaming=False)
            _wait(inbox, requests, progress and sys.stderr.isatty())
        except BaseException:
            self.front.abort(requests)
            raise
        return [self.front.whole(request) for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        priority: int | Sequence[int] = 0,
        *,
        timeout: float | None = None,
        cache_salt: str | None = None,
        labels: dict[str, str] | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """As `generate`, but yields (index of the prompt, delta) while the answers grow.

        The last delta of a prompt has `finished`; one that failed has `finish_reason` "error". Leaving the loop, also
        by Ctrl-C, aborts what is outstanding. Errors are raised at the first step of the iteration."""
        options = RequestOptions(timeout=timeout, cache_salt=cache_salt, labels=labels or {})
        prepared = self._prepare(prompts, params, priority, options, chat_options)
        inbox = _Inbox()
        requests: list[ActiveRequest] = []
        try:
            requests = self.front.submit(prepared, inbox, streaming=True)
            index = {request: i for i, request in enumerate(requests)}
            while index:
                for request in inbox.wait(None):
                    delta = self.front.take(request)
                    if delta is None:
                        continue
                    yield index[request], delta
                    if delta.finished:
                        del index[request]
        finally:
            self.front.abort(requests)

    def _prepare(
        self,
        prompts: Any,
        params: Any,
        priority: Any,
        options: RequestOptions,
        chat_options: Mapping[str, Any] | None,
    ) -> list[PreparedRequest]:
        many = _as_list(prompts)
        each = zip(many, _spread("params", params, len(many)), _spread("priority", priority, len(many)), strict=True)
        return [
            self.front.prepare(
                prompt,
                one,
                options=msgspec.structs.replace(options, priority=urgency),
                index=i,
                chat_options=chat_options,
            )
            for i, (prompt, one, urgency) in enumerate(each)
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        priority: int | Sequence[int] = 0,
        progress: bool = True,
        *,
        timeout: float | None = None,
        add_generation_prompt: bool = True,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, through the model's chat template; otherwise as `generate`.

        A conversation is a list of messages, `{"role": "user", "content": "Hello"}`."""
        many = _as_list(messages)
        for i, conversation in enumerate(many):
            if not isinstance(conversation, Sequence) or not conversation or not isinstance(conversation[0], Mapping):
                raise InvalidRequestError(f"prompt {i}: chat takes lists of messages; for other prompts use generate")
        chat_options = {"add_generation_prompt": add_generation_prompt, **template_variables}
        return self.generate(many, params, priority, progress, timeout=timeout, chat_options=chat_options)

    def close(self) -> None:
        """Stop the engine and free everything. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def load_constructor(
    model: str | Path | None,
    config: str | Path | None,
    plugins: Sequence[Any] | Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[LoadedSettings, Sequence[Any]]:
    """(settings, plugin objects) from the arguments of a constructor of `LLM` or `AsyncLLM`."""
    given = dict(settings)
    if model is not None:
        given["model"] = str(model)
    objects: Sequence[Any] = ()
    if isinstance(plugins, Mapping):
        given["plugins"] = plugins
    else:
        objects = plugins
    return load_settings(constructor=given, config_file=config), objects


class _Inbox:
    """The sink of one call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._news: dict[ActiveRequest, None] = {}

    def deliver(self, requests: list[ActiveRequest]) -> None:
        with self._changed:
            self._news.update(dict.fromkeys(requests))
            self._changed.notify_all()

    def wait(self, timeout: float | None) -> list[ActiveRequest]:
        """The requests with news, waiting up to `timeout` seconds for any."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout)
            news, self._news = list(self._news), {}
        return news


def _wait(inbox: _Inbox, requests: list[ActiveRequest], progress: bool) -> None:
    """Until all have ended, with a bar on stderr if wanted."""
    running = set(requests)
    if not progress:
        while running:
            running.difference_update(inbox.wait(None))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("Generating", total=len(requests), rate="")
        while running:
            running.difference_update(inbox.wait(REFRESH_S))
            tokens = sum(request.num_output_tokens for request in requests)
            rate = tokens / (bar.tasks[0].elapsed or REFRESH_S)
            bar.update(task, completed=len(requests) - len(running), rate=f"{rate:,.0f} tok/s")


def _as_list(prompts: Any) -> list[Any]:
    """Many prompts, from one or many."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(f"prompts must be a text, a mapping or a list, not {type(prompts).__name__}")
    first = prompts[0] if prompts else None
    is_ids = isinstance(first, int)
    is_chat = isinstance(first, Mapping) and "role" in first
    return [prompts] if is_ids or is_chat else list(prompts)


def _spread(name: str, value: Any, count: int) -> list[Any]:
    """One value per prompt."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(f"{name} has {len(value)} entries for {count} prompts: give one, or one per prompt")
    return list(value)
