"""The input of a batch: what is a request, and what is said of what is none."""

import json

import pytest

from interlace.batch import lines
from interlace.batch.errors import BatchError
from interlace.batch.lines import BadLine, BatchLine, check_input, parse_line, raw_lines


def line(custom_id="a", **changes):
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"}}
    return json.dumps(fields | changes)


def test_a_line_is_read():
    found = parse_line(7, line("x", body={"prompt": [1, 2], "n": 2}).encode())
    assert found == BatchLine(number=7, custom_id="x", url="/v1/completions", body={"prompt": [1, 2], "n": 2})


@pytest.mark.parametrize(
    ("text", "code", "custom_id", "said"),
    [
        ("{nope", "invalid_json_line", None, "line 3: not JSON"),
        ("[1]", "invalid_request_line", None, "A line is an object"),
        (line(5), "invalid_request_line", None, "custom_id"),
        (line(method="GET"), "invalid_method", "a", "'GET' is not supported: it must be POST"),
        (line(url="/v1/chat/completion"), "invalid_url", "a", "Did you mean '/v1/chat/completions'"),
        (line(url="/v1/embeddings"), "invalid_url", "a", "Supported: /v1/chat/completions, /v1/completions"),
        (line(body="hi"), "invalid_request_line", "a", "body"),
        ('{"custom_id": "a"}', "invalid_request_line", "a", "missing required field `method`"),
        (line(body={"x": 1}).replace("1", "NaN"), "invalid_json_line", None, "not JSON"),
        ("[" * 100_000, "invalid_request_line", None, "A line is an object"),
        (line(body={"x": 1}).replace("1", "[" * 100_000), "invalid_json_line", None, "not JSON"),
        (line(body={"x": "\ud800"}), "invalid_json_line", None, "not JSON"),
        (line(body={"x": "?"}).encode().replace(b"?", b"\xed\xa0\x80"), "invalid_json_line", "a", "not JSON"),
    ],
)
def test_what_is_no_request_is_told(text, code, custom_id, said):
    found = parse_line(3, text if isinstance(text, bytes) else text.encode())
    assert isinstance(found, BadLine)
    assert (found.number, found.code, found.custom_id) == (3, code, custom_id) and said in found.message


def test_lines_are_numbered_as_an_editor_does(tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text("one\n\n  \r\ntwo\r\nthree")
    assert list(raw_lines(path)) == [(1, b"one\n"), (4, b"two\r\n"), (5, b"three")]
    assert (check_input(path).lines, check_input(path).last) == (3, 5)
    monkeypatch.setattr(lines, "MAX_LINE", 4)
    path.write_text("abc\nabcdefghij\nxyz\nabcd")
    assert list(raw_lines(path)) == [(1, b"abc\n"), (2, None), (3, b"xyz\n"), (4, None)]
    assert parse_line(2, None).code == "line_too_long"


def test_an_id_may_occur_once(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([line("a"), "{broken", line("b"), "{broken", "", line("a")]))
    with pytest.raises(BatchError, match="custom_id 'a' occurs in lines 1 and 6"):
        check_input(path)
    with pytest.raises(BatchError, match="cannot be read"):
        check_input(tmp_path / "missing")
    path.write_text("")
    assert check_input(path).lines == 0
