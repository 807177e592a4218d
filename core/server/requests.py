"""The requests of the API: names and meanings are OpenAI's; the extras have the names vLLM gave them.

Ranges are checked by `SamplingParams`, for every way into the engine alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from interlace.errors import InvalidRequestError
from interlace.sampling.params import MAX_LOGPROBS, MAX_N, SamplingParams
from interlace.server.bodies import Body

_COMMON_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    # vLLM's
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "truncation_side": (),
    "logprob_token_ids": (),
    "session_id": (),
    "return_prompt_text": (False,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": (),
    "repetition_detection": (),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "include_reasoning": (True,),
    "watermarking": (),
}


class StreamOptions(Body):
    """What a stream contains beside the answer."""

    include_usage: bool = Field(default=False, description="End with a chunk that has `usage` and no choices.")
    continuous_usage_stats: bool = Field(default=False, description="With `include_usage`: usage in every chunk.")
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}


def _sampling(text: str, **bounds: Any) -> Any:
    """`bounds` only inform readers of the description: `SamplingParams` is the judge."""
    return Field(default=None, description=text, json_schema_extra=bounds or None)


_MAX_TOKENS = "Most tokens of an answer. More than fit beside the prompt is as many as fit, and no error."
_MESSAGES = {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/ChatMessage"}}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}


class GenerationRequest(Body):
    """What chats and completions have in common. What is not given has the default of `SamplingParams`."""

    model: str | None = Field(default=None, description="One of `/v1/models`. Missing: the model served.")
    stream: bool = Field(default=False, description="Answer piece by piece, as server-sent events.")
    stream_options: dict[str, Any] | None = Field(default=None, description="Only with `stream`.")
    n: int | None = _sampling("Answers to each prompt.", minimum=1, maximum=MAX_N)
    temperature: float | None = _sampling("0: always the most likely token.", minimum=0, maximum=100)
    top_p: float | None = _sampling(
        "Sample from the most likely tokens of this joint probability.", exclusiveMinimum=0, maximum=1
    )
    top_k: int | None = _sampling("Sample from this many most likely tokens; 0 or -1: all.", minimum=-1)
    min_p: float | None = _sampling("Least probability, relative to the most likely token.", minimum=0, maximum=1)
    presence_penalty: float | None = _sampling(
        "Subtracted from tokens that the answer has already.", minimum=-2, maximum=2
    )
    frequency_penalty: float | None = _sampling("Subtracted per occurrence in the answer.", minimum=-2, maximum=2)
    repetition_penalty: float | None = _sampling(
        "Divides tokens of prompt and answer; 1: off.", minimum=1e-6, maximum=100
    )
    seed: int | None = _sampling("Same seed, same request: same answer.", minimum=-(2**63), maximum=2**63 - 1)
    stop: str | list[str] | None = _sampling("Texts that end the answer.")
    stop_token_ids: list[int] | None = _sampling("Tokens that end the answer.")
    include_stop_str_in_output: bool | None = _sampling("Keep the text that ended the answer.")
    ignore_eos: bool | None = _sampling("Go on after an end-of-sequence token.")
    max_tokens: int | None = _sampling(_MAX_TOKENS, minimum=1)
    min_tokens: int | None = _sampling("Least tokens of an answer.", minimum=0)
    logit_bias: dict[str, float] | None = _sampling("Token id → what to add to its logit, -100 to 100.")
    allowed_token_ids: list[int] | None = _sampling("Sample from these only.")
    bad_words: list[str] | None = _sampling("Texts that the answer must not have.")
    bad_words_token_ids: list[list[int]] | None = _sampling("The same, as tokens.")
    prompt_logprobs: int | None = _sampling(
        "Log probabilities of this many tokens at each position of the prompt.", minimum=0, maximum=MAX_LOGPROBS
    )
    skip_special_tokens: bool | None = _sampling("Leave control tokens out of the text.")
    spaces_between_special_tokens: bool | None = _sampling("Write spaces around control tokens, where the model does.")
    skip_reading_prefix_cache: bool | None = _sampling("Compute the whole prompt.")
    logits_processors: dict[str, dict[str, Any]] | None = _sampling("Enabled logits processors and their arguments.")
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, description="Keep the last tokens of the prompt.")
    return_token_ids: bool = Field(default=False, description="Also answer with token ids.")
    return_tokens_as_token_ids: bool = Field(default=False, description="Log probabilities name tokens `token_id:N`.")
    priority: int = Field(default=0, description="Lower runs earlier, under policies that have priorities.")
    cache_salt: str | None = Field(
        default=None, min_length=1, description="Share cached prefixes only under this salt."
    )
    request_id: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9._:\-]{1,128}$", description="Part of the answer's id."
    )
    user: str | None = Field(default=None, description="Becomes the label `user`, for scheduling policies.")
    metadata: dict[str, str] | None = Field(default=None, description="Labels, for scheduling policies.")
    safety_identifier: str | None = Field(default=None, description="A hint that changes nothing here.")
    prompt_cache_key: str | None = Field(default=None, description="A hint that changes nothing here.")

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = _COMMON_UNSUPPORTED

    @property
    def labels(self) -> dict[str, str]:
        """Free words for scheduling policies."""
        return (self.metadata or {}) | ({} if self.user is None else {"user": self.user})

    def sampling(self, **changes: Any) -> SamplingParams:
        """The parameters given, `changes` last. Raises `InvalidRequestError`."""
        values = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            values["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        return SamplingParams(**(values | changes))


_SAMPLING = tuple(name for name in GenerationRequest.model_fields if name in SamplingParams.__struct_fields__)


def _token_id(key: str) -> int:
    # int() takes blanks, underscores and digits of other scripts, too.
    if not (key.isascii() and key.isdigit() and len(key) <= 18):
        raise InvalidRequestError(f"logit_bias has the key {key[:80]!r}: keys are token ids", param="logit_bias")
    return int(key)


class ChatPrompt(Body):
    """How a conversation becomes a prompt."""

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(_MESSAGES)] = Field(
        description="The conversation: objects with `role` and `content`."
    )
    add_generation_prompt: bool = Field(default=True, description="End the prompt where the assistant begins.")
    continue_final_message: bool = Field(default=False, description="Let the model continue the last message.")
    add_special_tokens: bool = Field(default=False, description="Add special tokens beside those of the template.")
    documents: list[dict[str, Any]] | None = Field(default=None, description="For templates that take documents.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Further template variables.")


class ChatRequest(ChatPrompt, GenerationRequest):
    """`POST /v1/chat/completions`."""

    max_completion_tokens: int | None = _sampling(_MAX_TOKENS, minimum=1)
    logprobs: bool = Field(default=False, description="Answer with log probabilities.")
    top_logprobs: int | None = _sampling(
        "With `logprobs`: of this many most likely tokens.", minimum=0, maximum=MAX_LOGPROBS
    )

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = _COMMON_UNSUPPORTED | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "prompt_cache_retention": (),
        "echo": (False,),
        "chat_template": (),
        "media_io_kwargs": (),
        "mm_processor_kwargs": (),
    }


_PROMPT_SCHEMA = {
    "description": "A text, a list of token ids, or a list of either.",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
}


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool = Field(default=False, description="Begin the answer with the prompt.")
    logprobs: int | None = _sampling("Of this many most likely tokens.", minimum=0, maximum=MAX_LOGPROBS)
    add_special_tokens: bool = Field(default=True, description="Add e.g. a BOS token to prompts that are texts.")

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = _COMMON_UNSUPPORTED | {"suffix": ("",), "prompt_embeds": ()}


class ChatMessage(Body):
    """One message. Further keys that clients send back with an answer pass while they are empty."""

    role: str
    content: Annotated[str | list[dict[str, Any]] | None, WithJsonSchema(_CONTENT)] = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
    }


class TokenizeRequest(Body):
    """`POST /tokenize` of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = Field(default=True, description="Add e.g. a BOS token.")
    return_token_strs: bool = Field(default=False, description="Also answer with the text of each token.")


class TokenizeChatRequest(ChatPrompt):
    """`POST /tokenize` of a conversation."""

    model: str | None = None
    return_token_strs: bool = Field(default=False, description="Also answer with the text of each token.")

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"tools": ([],), "chat_template": ()}


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = Field(default=False, description="Leave control tokens out of the text.")
