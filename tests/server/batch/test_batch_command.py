"""`interlace batch` with the embedded model: answers, errors, kills, a full disk."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from interlace.cli import main

# Another batch rounds otherwise; in float32 that decides no token.
ENGINE = ("--threads", "1", "--scheduler.max_num_seqs", "8", "--dtype", "float32")


def request(custom_id, prompt="Count: one, two,", url="/v1/completions", **body):
    body = {"model": "smollm2", "max_tokens": 6, "temperature": 0} | body
    body |= {"prompt": prompt} if url == "/v1/completions" else {"messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def answers(path):
    """Custom id → record; each id once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["id"] for record in found}) == len(found)
    return {record["custom_id"]: record for record in found}


def texts(path):
    found = {}
    for custom_id, record in answers(path).items():
        [choice] = record["response"]["body"]["choices"]
        found[custom_id] = choice.get("text") or choice["message"]["content"]
    return found


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def batch(*arguments):
    return main(["batch", *map(str, arguments), *ENGINE])


def test_a_batch_is_answered_and_its_bad_lines_with_errors(smollm2_path, files, capsys):
    source, output = files
    write(
        source,
        request("text"),
        request("chat", "Hello", "/v1/chat/completions"),
        "{broken",
        request("two", n=2, temperature=1.0, seed=3),
        request("hot", temperature=-1),
        request("typo", max_token=3),
        request("model", model="gpt-4"),
        request("stream", stream=True),
        request("long", prompt=[1] * 9000),
        request("embed") | {"url": "/v1/embeddings"},
    )
    assert batch(source, output) == 1
    found = answers(output)
    assert len(found) == 10
    text = found["text"]
    assert text["id"] == "batch_req_1" and text["error"] is None and text["response"]["status_code"] == 200
    body = text["response"]["body"]
    assert body["object"] == "text_completion" and body["usage"]["completion_tokens"] == 6
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert [choice["index"] for choice in found["two"]["response"]["body"]["choices"]] == [0, 1]
    for name, status, said in (
        ("hot", 400, "temperature = -1"),
        ("typo", 400, "Did you mean 'max_tokens'"),
        ("model", 404, "'gpt-4' does not exist here"),
        ("stream", 400, "stream is not possible in a batch"),
        ("long", 400, "9000 tokens"),
    ):
        response = found[name]["response"]
        assert (response["status_code"], found[name]["error"]) == (status, None)
        assert said in response["body"]["error"]["message"]
    assert found[None]["error"]["code"] == "invalid_json_line" and found["embed"]["error"]["code"] == "invalid_url"
    err = capsys.readouterr().err
    assert "10 lines answered, 7 of them with an error" in err

    # A second run has nothing to do, and starts no engine; a third one tries what failed.
    before = output.read_bytes()
    assert batch(source, output) == 1 and output.read_bytes() == before
    assert "10 of 10 lines are answered already (7 of them failed: --retry-failed" in capsys.readouterr().err
    source.write_text(source.read_text().replace('"temperature": -1', '"temperature": 0.0'))
    assert batch(source, output, "--retry-failed", "--max-in-flight", 2) == 1
    assert answers(output)["hot"]["response"]["status_code"] == 200 and len(answers(output)) == 10
    assert "10 lines answered, 6 of them with an error; in this run 7 lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing", "out"], "missing cannot be read"),
        (["in", "in"], "input and output at once"),
        (["in", "other"], "holds the answer to another line 1|belongs to another input"),
        (["twice", "out"], "custom_id 'a' occurs in lines 1 and 3"),
        (["in", "."], "cannot be written"),
        (["in", "out", "--max-in-flight", "0"], "0 is too small"),
        (["in"], "OUT.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_before_the_engine_starts(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", request("a"))
    write(tmp_path / "twice", request("a"), request("b"), request("a"))
    write(tmp_path / "other", {"id": "batch_req_7", "custom_id": "z", "response": None, "error": None})
    code = main(["batch", *arguments])
    err = capsys.readouterr().err
    assert code == 2 and any(part in err for part in said.split("|"))


def command(source, output):
    script = "import sys\nfrom interlace.cli import main\nsys.exit(main())"
    return [sys.executable, "-c", script, "batch", str(source), str(output), *ENGINE]


def mixed_requests(count):
    draw = random.Random(11)
    words = ["red", "blue", "green", "seven", "eleven", "river", "mountain", "castle", "lamp"]
    for number in range(count):
        prompt = f"{number}: " + " ".join(draw.choices(words, k=draw.randint(3, 30)))
        url = "/v1/chat/completions" if number % 4 == 0 else "/v1/completions"
        yield request(f"c{number}", prompt, url, max_tokens=draw.randint(2, 24))


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_what_one_run_gives(smollm2_path, files, tmp_path):
    source, output = files
    write(source, *mixed_requests(40), "not a request")
    draw = random.Random(1)
    kills = 0
    for share in (0, 0.1, 0.3, 0.7):  # of the lines that are answered when it is killed, at least
        process = subprocess.Popen(command(source, output), stderr=subprocess.DEVNULL)
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < share * 41):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 4
    assert output.read_bytes().count(b"\n") < 41, "the kills came too late to show anything"
    last = subprocess.run(command(source, output), capture_output=True, text=True, timeout=300)
    assert last.returncode == 1 and "lines are answered already" in last.stderr
    whole = tmp_path / "whole.jsonl"
    assert subprocess.run(command(source, whole), capture_output=True, timeout=300).returncode == 1
    found, expected = answers(output), answers(whole)
    assert found.keys() == expected.keys() and len(found) == 41
    assert found.pop(None) == expected.pop(None)
    assert {name: told(found[name]) for name in found} == {name: told(expected[name]) for name in expected}


def told(record):
    """What an answer says. When it was made and what was cached by then differ between runs."""
    body = record["response"]["body"]
    return body["id"], body["choices"], body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]


@pytest.mark.slow
def test_a_full_disk_stops_it_cleanly_and_more_room_lets_it_go_on(smollm2_path, files):
    source, output = files
    write(source, *(request(f"c{number}", f"{number} apples and") for number in range(30)))

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    full = subprocess.run(command(source, output), capture_output=True, text=True, timeout=120, preexec_fn=small_disk)
    kept = len(answers(output))
    assert full.returncode == 2 and "cannot be written: File too large" in full.stderr
    assert f"The {kept} lines answered so far are in it" in full.stderr and "Traceback" not in full.stderr
    assert 0 < kept < 30 and os.path.getsize(output) <= 4000
    assert subprocess.run(command(source, output), capture_output=True, timeout=120).returncode == 0
    assert len(answers(output)) == 30 and len(texts(output)) == 30


@pytest.mark.slow
def test_an_engine_process_that_dies_is_waited_for(smollm2_path, files, tmp_path):
    source, output = files
    write(source, *(request(f"c{number}", f"{number} pears and", max_tokens=40) for number in range(24)))
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen([*command(source, output), "--engine.process", "subprocess"], stderr=stderr)
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    [child] = [line.split()[0] for line in children.stdout.splitlines() if "subprocess_main" in line]
    os.kill(int(child), signal.SIGKILL)
    assert process.wait(timeout=120) == 0, log.read_text()
    assert len(texts(output)) == 24
