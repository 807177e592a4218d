"""What is asked of a server: lengths, shared prefixes, and the three trace formats.

The trace lines here are made up; only their form is that of the published files.
"""

import json
import random
import statistics

import pytest

from interlace.bench.serve.lengths import parse_lengths
from interlace.bench.serve.traces import detect_format, read_trace
from interlace.bench.serve.vocabulary import Vocabulary, common_words, load_tokenizer, words_of
from interlace.bench.serve.workloads import (
    PromptMaker,
    file_workload,
    random_workload,
    shared_prefix_workload,
    sharegpt_workload,
    trace_workload,
)
from interlace.bench.workloads import WorkloadError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:59.9000000,374,44
2023-11-16 18:16:00.1500005,396,0
2023-11-16 18:16:01.4000000,20,5
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,230,1317,API log
118,ChatGPT,417,0,417,Conversation log
"""
MOONCAKE = "".join(
    json.dumps({"timestamp": when, "input_length": length, "output_length": 3, "hash_ids": ids}) + "\n"
    for when, length, ids in [(0, 1100, [7, 8, 9]), (250, 1030, [7, 8, 10]), (250, 512, [11]), (3000, 600, [12])]
)


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary([f" w{number}" for number in range(500)], list(range(1000, 1500)))


@pytest.fixture
def write(tmp_path):
    def put(text, name="trace"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return put


# ── Lengths ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "mean", "deviation"),
    [
        ("128", 128, 0),
        ("64-256", 160, 193 / 12**0.5),
        ("normal:300,40", 300, 40),
        ("exponential:200", 200, 200),
        ("lognormal:100,0.5", 113.3, 60.4),
    ],
)
def test_lengths_are_distributed_as_written(text, mean, deviation):
    lengths, draw = parse_lengths(text), random.Random(1)
    values = [lengths.draw(draw) for _ in range(20_000)]
    assert statistics.fmean(values) == pytest.approx(mean, rel=0.03)
    assert statistics.pstdev(values) == pytest.approx(deviation, rel=0.05)
    assert min(values) >= 1


@pytest.mark.parametrize("text", ["", "0", "-5", "9-4", "normal:5", "zipf:2", "1.5", "exponential:0"])
def test_other_lengths_are_refused(text):
    with pytest.raises(WorkloadError, match="is no length: write N, LOW-HIGH"):
        parse_lengths(text)


# ── Prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_words_of_the_embedded_model_are_one_token_each(smollm2_path):
    tokenizer = load_tokenizer("smollm2")
    found = words_of(tokenizer)
    places = found.draw(random.Random(2), 3000)
    assert tokenizer.encode(found.text(places)) == found.token_ids(places)
    assert len(found.words) == len(set(found.words)) > 1000


def test_common_words_are_about_one_token_each(smollm2_path):
    words = common_words()
    text = words.text(words.draw(random.Random(3), 1000))
    assert len(load_tokenizer("smollm2").encode(text)) == pytest.approx(1000, rel=0.02)
    assert words.count(text) == 1000 and words.token_ids([1, 2]) is None


def test_random_prompts_follow_lengths_and_seed(vocabulary):
    maker = PromptMaker(vocabulary, takes_ids=True)
    shape = {"inputs": parse_lengths("5-9"), "outputs": parse_lengths("3")}
    work, again, other = (random_workload(maker, 40, **shape, seed=seed) for seed in (1, 1, 2))
    assert work == again != other
    assert {len(item.prompt) for item in work.items} == {5, 6, 7, 8, 9}
    assert {item.max_tokens for item in work.items} == {3}
    texts = random_workload(PromptMaker(vocabulary, takes_ids=False), 40, **shape, seed=1)
    assert [len(item.prompt.split()) for item in texts.items] == [len(item.prompt) for item in work.items]


def test_shared_prefixes_are_shared_within_groups_only(vocabulary):
    maker = PromptMaker(vocabulary, takes_ids=True)
    shape = {"inputs": parse_lengths("6"), "outputs": parse_lengths("2")}
    work = shared_prefix_workload(maker, 60, groups=3, prefix_len=10, **shape, seed=4)
    prefixes = [tuple(item.prompt[:10]) for item in work.items]
    assert len(set(prefixes)) == 3 and min(map(prefixes.count, set(prefixes))) > 5
    assert {len(item.prompt) for item in work.items} == {16}
    assert len({tuple(item.prompt[10:]) for item in work.items}) == 60


def test_conversations_keep_their_text(vocabulary, write):
    talks = [
        {"conversations": [{"from": "human", "value": f"what is thing {n}"}, {"from": "gpt", "value": "a b c d " * n}]}
        for n in (1, 2, 3)
    ]
    path = write(json.dumps(talks), "talks.json")
    shape = {"path": path, "max_len": None, "seed": 0}
    work = sharegpt_workload(PromptMaker(vocabulary, True), 3, outputs=None, **shape)
    assert {(item.prompt, item.max_tokens) for item in work.items} == {(f"what is thing {n}", 4 * n) for n in (1, 2, 3)}
    work = sharegpt_workload(PromptMaker(vocabulary, True), 3, outputs=parse_lengths("7"), **shape)
    assert {item.max_tokens for item in work.items} == {7}


def test_a_workload_file_goes_to_an_endpoint_that_takes_ids(write):
    path = write(
        json.dumps([{"prompt_token_ids": [1, 2], "max_tokens": 5}, {"prompt_token_ids": [3], "max_tokens": 6}])
    )
    work = file_workload(path, None, None, takes_ids=True, seed=0)
    assert [(item.prompt, item.max_tokens) for item in work.items] == [([1, 2], 5), ([3], 6)]
    with pytest.raises(WorkloadError, match="--endpoint completions"):
        file_workload(path, None, None, takes_ids=False, seed=0)


# ── Traces ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "form", "rows"),
    [
        (AZURE, "azure", [(0.0, 374, 44), (1.5, 20, 5)]),
        (BURSTGPT, "burstgpt", [(0.0, 472, 18), (40.5, 1087, 230)]),
        (MOONCAKE, "mooncake", [(0.0, 1100, 3), (0.25, 1030, 3), (0.25, 512, 3), (3.0, 600, 3)]),
    ],
)
def test_the_three_formats_are_read(write, text, form, rows):
    path = write(text)
    assert detect_format(path) == form
    found = read_trace(path)
    got = [(row.time_s - found[0].time_s, row.input_len, row.output_len) for row in found]
    assert [lengths[1:] for lengths in got] == [lengths[1:] for lengths in rows]
    assert [row[0] for row in got] == pytest.approx([row[0] for row in rows])
    assert len(read_trace(path, 1)) == 1


def test_equal_hashes_are_equal_blocks(vocabulary, write):
    work = trace_workload(
        PromptMaker(vocabulary, True), None, path=write(MOONCAKE), max_len=None, length_scale=1.0, seed=0
    )
    one, two, three, four = (item.prompt for item in work.items)
    assert [len(prompt) for prompt in (one, two, three, four)] == [1100, 1030, 512, 600]
    assert one[:1024] == two[:1024] and one[1024:1030] != two[1024:1030]
    assert three != one[:512]
    assert work.times == [0.0, 0.25, 0.25, 3.0]


def test_scaled_traces_share_scaled_blocks(vocabulary, write):
    maker = PromptMaker(vocabulary, True)
    work = trace_workload(maker, 2, path=write(MOONCAKE), max_len=None, length_scale=0.125, seed=0)
    one, two = (item.prompt for item in work.items)
    assert (len(one), len(two)) == (138, 129) and one[:128] == two[:128] and one[128] != two[128]


def test_requests_that_are_too_long_are_left_out(vocabulary, write):
    maker = PromptMaker(vocabulary, True)
    work = trace_workload(maker, None, path=write(MOONCAKE), max_len=1033, length_scale=1.0, seed=0)
    assert [len(item.prompt) for item in work.items] == [1030, 512, 600] and "at most 1033 tokens" in work.description
    with pytest.raises(WorkloadError, match="no request of this trace can be used"):
        trace_workload(maker, None, path=write(MOONCAKE), max_len=10, length_scale=1.0, seed=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "is no known trace: its first line is 'a,b'"),
        ("", "is no known trace"),
        (AZURE + "2023-11-16 18:16:02.0,many,4\n", "line 5: not a request of this trace: .*'many'"),
        (BURSTGPT + "7,GPT-4,3\n", "line 5: not a request of this trace"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 5: not a request of a Mooncake trace"),
    ],
)
def test_bad_traces_name_the_line(write, text, said):
    with pytest.raises(WorkloadError, match=said):
        read_trace(write(text))
