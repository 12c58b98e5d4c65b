"""The neighbourhood attack's closed form against neighbours that are written out and scored one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from geoquant.data.records import Record
from geoquant.privacy.attacks import loss, neighbourhood
from geoquant.privacy.evidence import Evidence
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.scoring import score_records
from geoquant.privacy.statistics import auc

TEXTS = ["Ann Lee, 47", "x", "nine pears"]


def made(log_prob: np.ndarray, mean: np.ndarray, lengths) -> RecordScores:
    """Scores of records of these lengths."""
    splits = np.concatenate([[0], np.cumsum(lengths)])
    rest, places = np.full(len(log_prob), np.nan, np.float32), np.arange(len(log_prob))
    return RecordScores(log_prob, mean, rest, rest > 0, rest, places, places + 1, splits)


@torch.no_grad()
def log_prob(model, texts: torch.Tensor) -> torch.Tensor:
    """Log-probability of each whole text, one a row, behind its first token."""
    logp = torch.log_softmax(model(input_ids=texts).logits[:, :-1].double(), 2)
    return logp.gather(2, texts[:, 1:, None])[..., 0].sum(1)


def test_closed_form_is_the_mean_over_all_neighbours_written_out(tiny_model, tiny_tokenizer):
    """Each beginning of the text with each token of the vocabulary at its end, weighted by how likely it is redrawn."""
    found = neighbourhood.score(Evidence(score_records(tiny_model, tiny_tokenizer, [Record(t) for t in TEXTS])))
    vocabulary = torch.arange(304)
    for text, value in zip(TEXTS, found, strict=True):
        ids = torch.tensor(tiny_tokenizer(text).input_ids)
        if len(ids) < 2:
            assert value == -np.inf
            continue
        gains = []
        for place in range(1, len(ids)):
            begins = torch.cat([ids[:place].expand(304, place), vocabulary[:, None]], 1)
            neighbours = log_prob(tiny_model, begins)
            before = log_prob(tiny_model, ids[None, :place])
            redrawn = (neighbours - before).exp()
            assert redrawn.sum().item() == pytest.approx(1)
            gains.append(neighbours[ids[place]] - (redrawn * neighbours).sum())
        assert value == pytest.approx(torch.stack(gains).mean().item(), abs=1e-4)


def test_what_the_model_writes_itself_scores_zero_however_hard(tiny_model):
    """Texts drawn by stock sampling, before and after cooling it: the loss attack takes the cool ones for members."""
    torch.manual_seed(0)
    levels = []
    for scale in (1.0, 4.0):
        tiny_model.model.norm.weight.data.mul_(scale)
        draws = tiny_model.generate(
            torch.arange(5, 105)[:, None].repeat(2, 1), max_new_tokens=20, min_new_tokens=20, do_sample=True, top_k=0
        )
        with torch.no_grad():
            logp = torch.log_softmax(tiny_model(input_ids=draws).logits[:, :-1].double(), 2)
        own = logp.gather(2, draws[:, 1:, None])[..., 0].flatten().numpy()
        expected = (logp.exp() * logp).sum(2).flatten().numpy()
        evidence = Evidence(made(own, expected, [20] * len(draws)))
        scores = neighbourhood.score(evidence)
        # The end token is kept from being drawn, which moves the mean a little.
        assert abs(scores.mean()) < 4 * scores.std() / np.sqrt(len(scores)) + 0.01
        levels.append(loss.score(evidence).mean())
    assert levels[1] > levels[0] + 1


def test_it_finds_members_among_records_of_all_difficulties():
    """log p = difficulty + noise + effect of training: the closed form leaves noise and effect, whose AUC is known."""
    rng = np.random.default_rng(0)
    n, tokens, effect = 2000, 25, 0.3
    member = np.arange(n) < n // 2
    difficulty = np.repeat(-3 + 1.5 * rng.normal(size=n), tokens)
    noise = rng.normal(size=n * tokens)
    scores = made(difficulty + noise + effect * np.repeat(member, tokens), difficulty, [tokens] * n)
    found, base = (attack.score(Evidence(scores)) for attack in (neighbourhood, loss))
    best = norm.cdf(effect * np.sqrt(tokens / 2))
    assert auc(found[member], found[~member]) == pytest.approx(best, abs=0.03)
    assert auc(base[member], base[~member]) < best - 0.2
