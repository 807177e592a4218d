"""What is said of GGUF files that cannot be. Random damage is done by the conformance suite."""

from __future__ import annotations

import struct

import pytest

from interlace.errors import CheckpointError
from interlace.plugins.checkpoints.gguf import GgufCheckpoint
from interlace.plugins.checkpoints.gguf_reader import GgufFile


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
