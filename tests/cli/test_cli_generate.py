"""`interlace generate` over a scripted engine, in this process."""

import json

import pytest

from interlace.cli import main
from interlace.cli.answers import Answer
from interlace.cli.generate import summary
from interlace.engine.front import Front
from interlace.messages import CompletionOutput, RequestMetrics, RequestOutput, Usage
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import byte_tokenizer, fake_assembly, front_spec

TOKENIZER = byte_tokenizer()


class Failing(ScriptedClient):
    """Ends every request whose prompt contains an exclamation mark with an error."""

    def add(self, requests):
        super().add(requests)
        for request in requests:
            if "!" in TOKENIZER.decode(request.prompt_token_ids):
                self.fail(request.id, "no room", "kv_capacity")


@pytest.fixture
def clients(monkeypatch):
    clients = []

    def open_fake(loaded, **options):
        clients.append(Failing(lambda request: [*request.prompt_token_ids, 256]))
        return Front(fake_assembly(clients[-1], spec=front_spec(257, max_model_len=400)))

    monkeypatch.setattr(Front, "open", open_fake)
    return clients


def run(capsys, *arguments):
    code = main(["generate", *arguments])
    return code, *capsys.readouterr()


def test_one_prompt_prints_only_its_answer_on_stdout(clients, capsys):
    code, out, err = run(capsys, "--prompt", "hello there")
    assert (code, out) == (0, "hello there\n")
    assert "1 prompts, 12 tokens" in err and "TTFT" in err and "prefix-cache hits: 0 of 11 prompt tokens (0%)" in err


def test_several_prompts_come_in_order_under_headings(clients, capsys):
    code, out, err = run(capsys, "--prompt", "the longest of them", "--prompt", "b")
    assert (code, out) == (0, "[1] the longest of them\nthe longest of them\n\n[2] b\nb\n\n")
    assert err.count("stop") == 2


def test_json_is_an_array_of_request_outputs_and_nothing_else(clients, capsys):
    code, out, _ = run(capsys, "--json", "--prompt", "ab", "--prompt", "c", "--logprobs", "0")
    first, second = json.loads(out)
    assert code == 0
    assert (first["prompt"], first["outputs"][0]["text"], first["outputs"][0]["finish_reason"]) == ("ab", "ab", "stop")
    assert first["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0}
    assert second["prompt_token_ids"] == TOKENIZER.encode("c") and len(second["outputs"][0]["logprobs"]) == 2


def test_flags_become_parameters(clients, capsys):
    run(
        capsys,
        *("--prompt", "abc", "--max-tokens", "7", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "5"),
        *("--min-p", "0.1", "--stop", "x", "--stop", "y", "--stop-token-id", "3", "--bad-word", "no"),
        *("--presence-penalty", "0.1", "--frequency-penalty", "0.2", "--repetition-penalty", "1.1"),
        *("--ignore-eos", "--min-tokens", "2", "--n", "2", "--prompt-logprobs", "1"),
    )
    params = clients[0].added[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (7, 0.5, 0.9, 5, 0.1)
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("x", "y"), (3,), ("no",))
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (params.ignore_eos, params.min_tokens, params.n, params.prompt_logprobs) == (True, 2, 2, 1)


def test_chat_and_system(clients, capsys):
    code, out, _ = run(capsys, "--chat", "--system", "Be kind", "--prompt", "hi")
    assert (code, out) == (0, "<system>Be kind\n<user>hi\n<bot>\n")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "one\n\n  two\n", ["one", "  two"]),
        (
            "p.jsonl",
            '"one"\n{"prompt": "two"}\n[{"role": "user", "content": "hi"}]\n',
            ["one", "two", "<user>hi\n<bot>"],
        ),
        ("p.json", '["one", {"prompt_token_ids": [1, 2]}]', ["one", TOKENIZER.decode([1, 2])]),
    ],
)
def test_prompts_files(clients, capsys, tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    code, out, _ = run(capsys, "--json", "--prompts-file", str(tmp_path / name), "--max-tokens", "50")
    assert code == 0 and [output["outputs"][0]["text"] for output in json.loads(out)] == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", '"fine"\nnot json\n', "p.jsonl, line 2: not JSON"),
        ("p.json", '{"prompt": "a"}', "a JSON array of prompts is expected"),
        ("p.txt", "\n \n", "there is no prompt in it"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_bad_prompts_files(clients, capsys, tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    code, out, err = run(capsys, "--prompts-file", str(tmp_path / name))
    assert (code, out) == (2, "") and expected in err


def test_prompts_from_stdin(clients, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    code, out, _ = run(capsys, "--json", "--prompts-file", "-")
    assert code == 0 and [output["prompt"] for output in json.loads(out)] == ["one", "two"]


def test_nothing_to_answer(clients, capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and "give --prompt TEXT" in err


def test_a_wrong_parameter_is_one_clear_line(clients, capsys):
    code, _, err = run(capsys, "--prompt", "a", "--temperature", "-1")
    assert (
        code == 2
        and err == "interlace: error: temperature = -1.0 is not allowed: it must be a number from 0 (greedy) to 100\n"
    )
    code, _, err = run(capsys, "--prompt", "a", "--prompt", "b" * 500)
    assert code == 2 and "prompt 1: the prompt has 500 tokens" in err
    code, _, err = run(capsys, "--prompt", "a", "--max-token", "3")
    assert code == 2 and "--max-token" in err


def test_a_failed_request_is_reported_and_the_others_answered(clients, capsys):
    code, out, err = run(capsys, "--prompt", "bad!", "--prompt", "good")
    assert code == 1 and "[2] good\ngood\n" in out and "'bad!' failed: no room" in err
    code, out, _ = run(capsys, "--json", "--prompt", "bad!", "--prompt", "good")
    bad, good = json.loads(out)
    assert code == 1 and bad["outputs"][0]["error"] == "no room" and good["outputs"][0]["text"] == "good"


def test_several_samples_are_numbered(clients, capsys):
    code, out, _ = run(capsys, "--prompt", "ab", "--n", "2")
    assert (code, out) == (0, "[1] ab\n[0] ab\n[1] ab\n\n")


def test_the_live_view_ends_with_the_whole_texts(clients, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    prompts = [f"prompt number {i} " * 6 for i in range(12)]
    code, out, _ = run(capsys, *(word for prompt in prompts for word in ("--prompt", prompt)))
    assert code == 0
    flat = " ".join(out.split())
    assert all(" ".join(prompt.split()) in flat for prompt in prompts)


def test_rates_and_hits_of_the_closing_table():
    metrics = RequestMetrics(
        arrival_time=1.0, first_scheduled_time=1.1, first_token_time=1.5, last_token_time=3.5, finished_time=3.5
    )
    answer = Answer("title")
    answer.add(
        RequestOutput(
            request_id="r",
            prompt="p",
            prompt_token_ids=[1] * 40,
            outputs=[CompletionOutput(index=0, text="x", finish_reason="stop")],
            usage=Usage(prompt_tokens=40, completion_tokens=21, cached_tokens=32),
            metrics=metrics,
            finished=True,
        )
    )
    assert answer.row() == ("title", "40", "32", "21", "500 ms", "10.0", "2.50 s", "stop")
    assert summary([answer]) == (
        "1 prompts, 21 tokens in 2.50 s: 8.4 tokens/s; prefix-cache hits: 32 of 40 prompt tokens (80%)"
    )
