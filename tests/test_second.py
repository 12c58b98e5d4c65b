"""The second family: its training goes on to the same bits, and what it reads is not what it is judged on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import second  # noqa: E402

sys.path.remove(BENCHMARKS)

from geoquant.data.text import builtin_text  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """Short texts and a tiny model of the same family."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def untrained():
        torch.manual_seed(0)
        config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=second.VOCABULARY, **config))

    monkeypatch.setattr(second, "VOCABULARY", 300)
    monkeypatch.setattr(second, "LENGTH", 16)
    monkeypatch.setattr(second, "untrained", untrained)
    monkeypatch.setattr(second, "sources", lambda: builtin_text()[50_000:70_000])
    text = builtin_text()
    return text[:2000], text[2000:10_000], text[10_000:12_000]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_killed_training_ends_with_the_same_bits(small, tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    second.train(tmp_path / "whole", *small, 70)
    calls = []

    def dies(*given, **named):
        calls.append(1)
        if len(calls) > 60:
            raise KeyboardInterrupt
        return clip(*given, **named)

    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", dies)
    with pytest.raises(KeyboardInterrupt):
        second.train(tmp_path / "cut", *small, 70)
    assert not (tmp_path / "cut" / "base").exists()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    second.train(tmp_path / "cut", *small, 70)
    expected, found = (weights(tmp_path / name / "base") for name in ("whole", "cut"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    told = json.loads((tmp_path / "cut" / "base" / "training.json").read_text())
    assert told["steps"] == 70


def test_the_tenths_are_what_is_not_learned():
    first, middle, last = second.reference()
    assert first + middle + last == builtin_text()
    assert len(first) == len(last) == len(builtin_text()) // 10


def test_whoever_knows_frequencies_only_pays_their_entropy(monkeypatch):
    monkeypatch.setattr(second, "VOCABULARY", 2)
    seen = torch.tensor([[0] * 29 + [1] * 9])
    found = second.unigram(seen, torch.tensor([[1, 0, 0, 0, 1]]))
    assert found == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
