"""Damaged GGUF files give a `CheckpointError`, never another exception, a hang or a huge allocation."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interlace.errors import CheckpointError
from interlace.plugins.checkpoints.gguf import GgufCheckpoint
from interlace.plugins.checkpoints.gguf_reader import GgufFile

FUZZ = settings(
    max_examples=200,
    deadline=20_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=True,
)


def read_everything(path):
    checkpoint = GgufCheckpoint(GgufCheckpoint.Options(), path)
    config = checkpoint.config()
    tokenizer = checkpoint.tokenizer()
    tokenizer.decode(tokenizer.encode("some text 12"))
    return config, sum(1 for _ in checkpoint.weights())


def outcome(path, data):
    path.write_bytes(data)
    try:
        read_everything(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return str(error)
    return None


def test_the_intact_file_is_read(gguf_bytes, tmp_path):
    data, start = gguf_bytes
    path = tmp_path / "intact.gguf"
    path.write_bytes(data)
    config, count = read_everything(path)
    assert count in (21, 29) and config.num_layers == 2 and 0 < start < len(data)


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True), in_header=st.booleans())
def test_truncated_anywhere(gguf_bytes, tmp_path, share, in_header):
    data, start = gguf_bytes
    cut = int(share * (start if in_header else len(data)))
    message = outcome(tmp_path / "cut.gguf", data[:cut])
    assert message is not None, f"{cut} of {len(data)} bytes were taken for a whole file"


@FUZZ
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_the_header(gguf_bytes, tmp_path, places):
    data, start = gguf_bytes
    damaged = bytearray(data)
    for share, flip in places:
        damaged[int(share * start)] ^= flip
    outcome(tmp_path / "flipped.gguf", bytes(damaged))


@FUZZ
@given(position=st.integers(0, 2**20), value=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
def test_absurd_lengths(gguf_bytes, tmp_path, position, value):
    data, start = gguf_bytes
    damaged = bytearray(data)
    struct.pack_into("<Q", damaged, position % (start - 8), value)
    outcome(tmp_path / "absurd.gguf", bytes(damaged))


@FUZZ
@given(data=st.binary(max_size=200))
def test_noise(tmp_path, data):
    assert outcome(tmp_path / "noise.gguf", b"GGUF" + struct.pack("<I", 3) + data) is not None


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(60), "magic"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "announces 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "announces 1152921504606846976 metadata keys"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**61), "announces .* values"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 0) + bytes(9), None),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99) + bytes(9), "metadata type 99"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(9), "not UTF-8"),
    ],
)
def test_headers_that_cannot_be(tmp_path, head, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(head)
    if message is None:
        assert GgufFile(path).metadata == {"k": []}
        return
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


def test_unreadable_type_of_tensor(gguf_bytes, tmp_path):
    data, _ = gguf_bytes
    name = b"blk.0.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8
    damaged = bytearray(data)
    struct.pack_into("<I", damaged, place, 16)  # IQ2_XXS
    message = outcome(tmp_path / "iq2.gguf", bytes(damaged))
    assert message is not None and "blk.0.ffn_up.weight" in message and "type 16" in message and "Q6_K" in message
