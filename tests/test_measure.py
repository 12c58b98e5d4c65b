"""The texts of a run: what serves calibration, what evaluation, and how often each is tokenised."""

from __future__ import annotations

import pytest
import torch

from geoquant import measure
from geoquant.data.text import windows
from geoquant.errors import UserError
from geoquant.measure import builtin_tail, prepare_texts
from geoquant.recipe import Recipe

TEXT = "".join(chr(97 + index * 7 % 26) for index in range(100))


class Counting:
    """A tokenizer of one token a character that counts what it is given; it adds no BOS."""

    bos_token_id = None

    def __init__(self):
        self.seen = []

    def __call__(self, text, **_):
        self.seen.append(text)
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    monkeypatch.setattr(measure, "builtin_text", lambda: TEXT)


def test_the_built_in_text_is_tokenised_once_and_cut_at_both_ends():
    tokenizer = Counting()
    texts = prepare_texts(tokenizer, Recipe(model="m", window=8, windows=3, evaluation_windows=2))
    assert tokenizer.seen == [TEXT]
    assert torch.equal(texts.calibration.tokens, windows(Counting(), TEXT, length=8, count=3).tokens)
    assert torch.equal(texts.evaluation.tokens, windows(Counting(), TEXT, length=8).tokens[-2:])
    assert torch.equal(texts.evaluation.tokens, builtin_tail(Counting(), 8, 2).tokens)
    assert texts.calibration.sha256 == texts.evaluation.sha256 == windows(Counting(), TEXT, length=8).sha256


def test_ends_that_would_overlap_are_refused():
    with pytest.raises(UserError) as caught:
        prepare_texts(Counting(), Recipe(model="m", window=8, windows=11, evaluation_windows=2))
    assert str(caught.value) == (
        "the built-in text has 12 windows of 8 tokens; wanted 11 to calibrate and 2 to evaluate; "
        "give --text FILE, or fewer windows"
    )
    with pytest.raises(UserError, match="wanted 0 to calibrate and 13 to evaluate"):
        builtin_tail(Counting(), 8, 13)


def test_a_text_of_ones_own_for_calibration_leaves_the_whole_tail(tmp_path):
    (tmp_path / "mine.txt").write_text("x" * 40)
    recipe = Recipe(model="m", window=8, windows=5, evaluation_windows=12, calibration=str(tmp_path / "mine.txt"))
    texts = prepare_texts(Counting(), recipe)
    assert (len(texts.calibration), len(texts.evaluation)) == (5, 12)
