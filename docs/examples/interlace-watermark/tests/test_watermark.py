"""The processor alone, and the detector on what it makes."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from interlace.interfaces.logits_processor import LogitsRow
from pydantic import ValidationError

from interlace_watermark.detect import detect, main
from interlace_watermark.greenlist import is_green, seed_of
from interlace_watermark.logits_processor import Watermark

VOCAB = 500


def generate(num_tokens: int, seed: int, **args: object) -> list[int]:
    """Tokens drawn from random logits, with the watermark if `args` ask for one."""
    generator = torch.Generator().manual_seed(seed)
    processor = Watermark(Watermark.Options(), VOCAB)
    if args:
        processor.add(0, Watermark.Args.model_validate(args), [7])
    tokens: list[int] = []
    for _ in range(num_tokens):
        logits = torch.randn(1, VOCAB, generator=generator)
        if args:
            processor.apply(logits, [LogitsRow(0, 0, np.array(tokens, dtype=np.int32))])
        tokens.append(int(torch.multinomial(logits.softmax(-1)[0], 1, generator=generator)))
    return tokens


@pytest.mark.parametrize("seed", range(10))
def test_a_watermark_is_found_with_its_key_only(seed: int):
    marked = generate(200, seed, key="mine")
    assert detect(marked, "mine").z_score > 4
    assert detect(marked, "another").z_score < 4
    assert detect(generate(200, seed), "mine").z_score < 4


def test_scores_without_a_watermark_are_as_the_theory_says():
    """Over many texts: mean 0 and standard deviation 1, whatever the share of green tokens."""
    for gamma in (0.1, 0.25, 0.5):
        scores = [detect(generate(100, seed), "mine", gamma).z_score for seed in range(200)]
        assert abs(np.mean(scores)) < 0.25 and 0.85 < np.std(scores) < 1.15


def test_green_tokens_are_the_stated_share_and_differ_by_key_and_token_before():
    tokens = np.arange(50_000)
    green = is_green(seed_of("a"), 3, tokens, 0.25)
    assert green.mean() == pytest.approx(0.25, abs=0.01)
    for other in (is_green(seed_of("b"), 3, tokens, 0.25), is_green(seed_of("a"), 4, tokens, 0.25)):
        assert (green & other).mean() == pytest.approx(0.0625, abs=0.005)  # as if drawn apart
    assert (is_green(seed_of("a"), 3, tokens, 0.5) >= green).all()  # a larger share contains the smaller


def test_only_green_logits_rise_and_by_delta():
    processor = Watermark(Watermark.Options(), VOCAB)
    processor.add(5, Watermark.Args(key="k", gamma=0.5, delta=3.0), [1, 2, 9])
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = -torch.inf
    processor.apply(logits, [LogitsRow(1, 5, np.array([], dtype=np.int32))])
    green = torch.from_numpy(is_green(seed_of("k"), 9, np.arange(VOCAB), 0.5))
    expected = torch.where(green, 3.0, 0.0)
    expected[4] = -torch.inf
    assert torch.equal(logits[1], expected)
    assert not logits[0].any() and not logits[2].any()


def test_repetition_does_not_fake_a_watermark():
    first = next(token for token in range(VOCAB) if is_green(seed_of("k"), [1, token], [token, 1]).all())
    assert detect([1, first] * 100, "k").z_score < 4


def test_too_short_a_text_says_nothing():
    assert detect([], "k") == detect([3], "k") == (0, 0, 0.0)


def test_a_request_without_any_key_is_refused():
    processor = Watermark(Watermark.Options(), VOCAB)
    with pytest.raises(ValueError, match=r"needs a key.*logits_processors\.options\.watermark\.key"):
        processor.add(0, Watermark.Args(), [1])


def test_engine_options_hold_where_the_request_says_nothing():
    options = Watermark.Options(key="engine's", gamma=0.5)
    mine, given = Watermark(options, VOCAB), Watermark(Watermark.Options(), VOCAB)
    mine.add(0, Watermark.Args(), [1])
    given.add(0, Watermark.Args(key="engine's", gamma=0.5), [1])
    one, other = torch.zeros(1, VOCAB), torch.zeros(1, VOCAB)
    for processor, logits in ((mine, one), (given, other)):
        processor.apply(logits, [LogitsRow(0, 0, np.array([8], dtype=np.int32))])
    assert torch.equal(one, other)
    assert "engine's" not in repr(options)


@pytest.mark.parametrize(
    "args", [{"key": ""}, {"key": "k", "gamma": 0}, {"key": "k", "gamma": 1}, {"key": "k", "delta": -1}, {"kye": "k"}]
)
def test_arguments_are_checked(args: dict[str, object]):
    with pytest.raises(ValidationError):
        Watermark.Args.model_validate(args)


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    marked = generate(100, 0, key="mine")
    answers = [{"outputs": [{"token_ids": marked}]}, {"outputs": [{"token_ids": generate(100, 1)}]}]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(answers)))
    assert main(["--key", "mine"]) == 0
    scores = [float(line.split()[2].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 2 and scores[0] > 4 > scores[1]
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": 1}'))
    assert main(["--key", "mine"]) == 1
    assert "neither a list of token ids" in capsys.readouterr().out
