"""Chat templates: the conventions of Hugging Face, in a sandbox, with clear errors."""

from __future__ import annotations

from datetime import datetime

import pytest

from interlace.chat_template import ChatTemplate
from interlace.errors import InvalidRequestError

USER = {"role": "user", "content": "Hi"}


def render(source, messages=(USER,), prompt=True, **extra):
    template = ChatTemplate(source, {"bos_token": "<s>"}, lambda: datetime(2026, 3, 4), "model 'm'")
    return template.render(list(messages), prompt, **extra)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['role'] }}", "<s>user"),
        ("{% if add_generation_prompt %}P{% endif %}", "P"),
        ("{%- if tools is none and documents is none %}none{% endif %}", "none"),
        ("{{ strftime_now('%d %b %Y') }}", "04 Mar 2026"),
        ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("A\n  {% if true %}\nB\n  {% endif %}\nC", "A\nB\nC"),
        ("{% generation %}x{{ messages[0].content }}{% endgeneration %}", "xHi"),
        ("{{ missing }}|{{ messages[0].tool_calls }}", "|"),
    ],
)
def test_conventions(source, text):
    assert render(source) == text


def test_extra_variables():
    tool = {"type": "function", "function": {"name": "f"}}
    assert render("{{ tools[0].function.name }}{{ enable_thinking }}", tools=[tool], enable_thinking=False) == "fFalse"
    assert render("{{ add_generation_prompt }}", prompt=False) == "False"


def test_same_as_transformers():
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{%- if tools %}{{ tools | tojson }}\n{%- endif %}\n{% for message in messages %}\n"
        "  {%- if loop.index0 == 2 %}{% continue %}{% endif %}\n"
        "  {{- message.role + ': ' + message.content | trim }}\n{% endfor %}\n"
        "{% if add_generation_prompt %}>{% endif %}\n"
    )
    messages = [USER, {"role": "assistant", "content": "  ok <b> "}, USER, {"role": "user", "content": "é"}]
    for extra in ({}, {"tools": [{"a": "<x>"}]}):
        expected = transformers.render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>", **extra
        )
        assert render(source, messages, **extra) == expected[0][0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 + 'x' }}", "TypeError"),
        ("{{ messages[0].content.missing.deeper }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ range(10000000) | list }}", "OverflowError"),
    ],
)
def test_a_template_that_fails(source, message):
    with pytest.raises(InvalidRequestError, match=message) as raised:
        render(source)
    assert "chat template of model 'm'" in str(raised.value)


def test_a_template_that_is_no_template():
    with pytest.raises(InvalidRequestError, match=r"not a valid jinja template \(line 2\).*--chat-template FILE"):
        render("ok\n{% if %}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("Hi", "must be a list .* not str"),
        (USER, "must be a list .* not dict"),
        ([USER, "x"], r"messages\[1\] must be an object, not str"),
        ([{"content": "x"}], r"messages\[0\] needs a 'role'"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] needs a 'role'"),
        ([USER, {"role": "user"}], r"messages\[1\] \(role 'user'\) needs 'content'"),
        ([{"role": "user", "content": object()}], r"messages\[0\]\.content is of type object"),
        ([{"role": "user", "content": [{"x": {1}}]}], r"messages\[0\]\.content\[0\]\.x is of type set"),
    ],
)
def test_wrong_messages(messages, message):
    template = ChatTemplate("{{ messages }}")
    with pytest.raises(InvalidRequestError, match=message):
        template.render(messages)


def test_the_callers_messages_are_not_touched():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert render("{{ messages[0].content[0].text }}", messages) == "a"
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


def test_a_tool_call_needs_no_content():
    assert render("{{ messages[0].tool_calls | length }}", [{"role": "assistant", "tool_calls": [1, 2]}]) == "2"
