"""The output of a batch as a journal: torn lines, foreign files, failures taken out, a full disk."""

import json
import os
import resource
import subprocess
import sys

import pytest

from interlace.batch.errors import BatchError
from interlace.batch.journal import BatchFailure, BatchRecord, BatchResponse, Journal, record_id


def record(number, custom_id="", status=200, text="fine"):
    response = BatchResponse(status_code=status, request_id=f"r{number}", body={"text": text})
    return BatchRecord(id=record_id(number), custom_id=custom_id or f"c{number}", response=response, error=None)


def bad_record(number):
    failure = BatchFailure(code="invalid_json_line", message="no")
    return BatchRecord(id=record_id(number), custom_id=None, response=None, error=failure)


def numbers(path):
    return [int(json.loads(line)["id"].rpartition("_")[2]) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def fill(path, *records):
    with Journal(path) as journal:
        for one in records:
            journal.append(one)


def test_records_are_remembered(path):
    fill(path, record(3), record(1), bad_record(2), record(9000))
    with Journal(path) as journal:
        assert (journal.done, journal.failed, journal.repaired, journal.last_done) == (4, 1, 0, 9000)
        assert [journal.is_done(n, f"c{n}") for n in (1, 3, 4, 9000, 9001)] == [True, True, False, True, False]
        assert journal.is_done(2, None)
    found = json.loads(path.read_text().splitlines()[0])
    assert found == {
        "id": "batch_req_3",
        "custom_id": "c3",
        "response": {"status_code": 200, "request_id": "r3", "body": {"text": "fine"}},
        "error": None,
    }


def test_a_file_cut_anywhere_keeps_its_whole_records(path):
    fill(path, record(1), record(2, text="ünïcode\u2028"), record(3))
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        with Journal(path) as journal:
            assert journal.done == kept and journal.repaired == cut - (ends[kept - 1] if kept else 0)
            for number in range(kept + 1, 4):
                journal.append(record(number, text="ünïcode\u2028" if number == 2 else "fine"))
        assert path.read_bytes() == whole


def test_what_a_power_cut_leaves_at_the_end_is_cut_off(path):
    fill(path, record(1), record(2))
    good = path.read_bytes()
    path.write_bytes(good + b"\0" * 40 + b'\n{"id": "batch_r\n\0\0')
    with Journal(path) as journal:
        assert journal.done == 2 and journal.repaired > 40
    assert path.read_bytes() == good


def test_records_larger_than_what_is_read_at_once(path):
    fill(path, record(1, text="x" * 3_000_000), record(2))
    with Journal(path) as journal:
        assert journal.done == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello\n", "line 1: this is no record of a batch"),
        (
            '{"id": "batch_req_x", "custom_id": "a", "response": null, "error": null}\n',
            "not of the form batch_req_LINE",
        ),
        ("GOOD1garbage\nGOOD2", "line 2: this is no record of a batch.*good records follow"),
        ("GOOD1GOOD1", "two records of input line 1"),
    ],
)
def test_files_that_are_no_output_are_left_alone(path, tmp_path, text, said):
    for number in (1, 2):
        fill(tmp_path / f"{number}", record(number))
        text = text.replace(f"GOOD{number}", (tmp_path / f"{number}").read_text())
    path.write_text(text)
    with pytest.raises(BatchError, match=said):
        Journal(path)
    assert path.read_text() == text


def test_the_output_of_another_input_is_noticed(path):
    fill(path, record(1, "mine"))
    with Journal(path) as journal, pytest.raises(BatchError, match=r"another line 1 .*'yours'"):
        journal.is_done(1, "yours")


def test_one_output_has_one_writer(path):
    with Journal(path), pytest.raises(BatchError, match="being written by another batch"):
        Journal(path)
    Journal(path).close()


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full", ".", "missing/out.jsonl"])
def test_other_things_than_files_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BatchError, match=r"is no regular file|cannot be written"):
        Journal(tmp_path / place)


def test_failures_are_taken_out_to_be_tried_again(path):
    fill(path, record(1), record(2, status=500), bad_record(3), record(4))
    with Journal(path) as journal:
        assert (journal.done, journal.failed) == (4, 2)
    with Journal(path, retry_failed=True) as journal:
        assert (journal.done, journal.failed) == (2, 0)
        assert not journal.is_done(2, "c2")
        with pytest.raises(BatchError, match="another batch"):
            Journal(path)  # the lock has moved to the new file
        journal.append(record(2))
    assert numbers(path) == [1, 4, 2]
    assert [entry.name for entry in path.parent.iterdir()] == ["out.jsonl"]


def test_a_full_disk_is_told_and_leaves_whole_records(path):
    """The limit on file size fails a write in the middle, as a full disk does."""
    script = f"""
import resource, sys
from pathlib import Path
from interlace.batch.errors import BatchError
from interlace.batch.journal import *
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    with Journal(Path({str(path)!r})) as journal:
        for number in range(1, 100):
            response = BatchResponse(status_code=200, request_id="r", body="x" * 100)
            journal.append(BatchRecord(id=record_id(number), custom_id=f"c{{number}}", response=response, error=None))
except BatchError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept = numbers(path)
    assert "cannot be written: File too large" in done.stdout and f"The {len(kept)} lines" in done.stdout
    assert kept == list(range(1, len(kept) + 1)) and 3 < len(kept) < 10
    assert path.read_bytes().endswith(b"\n")
    with Journal(path) as journal:
        assert journal.done == len(kept) and journal.repaired == 0


def test_a_sync_after_the_end_is_harmless(path):
    journal = Journal(path)
    journal.close()
    journal.sync()
    assert os.path.getsize(path) == 0 and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0
