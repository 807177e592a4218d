"""langchain-openai, a client that others wrote, against a real server."""

import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI


@pytest.fixture
def make(server):
    def build(kind=ChatOpenAI, **options):
        settings = {"model": "smollm2", "base_url": f"{server}/v1", "api_key": "none", "max_retries": 0}
        return kind(**(settings | {"temperature": 0, "max_tokens": 8} | options))

    return build


ASK = "What is the capital of France?"


def test_invoke(make):
    answer = make().invoke([("system", "Be brief."), ("human", ASK)])
    assert "Paris" in answer.content
    assert answer.usage_metadata["total_tokens"] == (
        answer.usage_metadata["input_tokens"] + answer.usage_metadata["output_tokens"]
    )
    assert answer.response_metadata["model_name"] == "smollm2"


def test_stream(make):
    pieces = list(make(stream_usage=True).stream(ASK))
    assert "".join(piece.content for piece in pieces) == make().invoke(ASK).content
    assert len(pieces) > 3
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) <= 8


async def test_async(make):
    assert "Paris" in (await make().ainvoke(ASK)).content
    assert "".join([piece.content async for piece in make().astream(ASK)])


def test_logprobs(make):
    answer = make(logprobs=True, top_logprobs=2).invoke(ASK)
    content = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in content).startswith(answer.content)
    assert all(len(token["top_logprobs"]) == 2 for token in content)


def test_n_and_stop(make):
    result = make(n=2, temperature=1.0, seed=5).generate([[HumanMessage(ASK)]])
    assert len(result.generations[0]) == 2
    stopped = make(kind=OpenAI, max_tokens=20).invoke("1, 2, 3, 4,", stop=[" 7"])
    assert stopped.endswith("6,")
    chat = make(max_tokens=20).bind(stop=["Paris"]).invoke(ASK)
    assert "Paris" not in chat.content and chat.response_metadata["finish_reason"] == "stop"


def test_completions_stream(make):
    assert "Paris" in "".join(make(kind=OpenAI).stream("The capital of France is"))


def test_tools_are_refused_in_words(make):
    def weather(city: str) -> str:
        """The weather in a city."""
        return "sunny"

    with pytest.raises(Exception, match=r"'tools'.*not supported by this server yet"):
        make().bind_tools([weather]).invoke(ASK)
