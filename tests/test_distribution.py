"""Statistics of next-token distributions against their definitions, in float64 and by sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.privacy.distribution import statistics


def by_definition(logits, truth):
    logp = torch.log_softmax(logits.double(), dim=1)
    p = logp.exp()
    finite = torch.where(p > 0, logp, torch.zeros_like(logp))
    mean = (p * finite).sum(1)
    std = ((p * finite**2).sum(1) - mean**2).clamp_min(0).sqrt()
    order = [sorted(range(len(row)), key=lambda z: (-row[z], z)).index(t) for row, t in zip(logits.tolist(), truth)]
    return logp[torch.arange(len(truth)), truth], mean, std, torch.tensor(order)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 37), scale=st.sampled_from([0.01, 1.0, 8.0]), ties=st.booleans())
def test_statistics_equal_their_definition(seed, rows, scale, ties):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, 501, generator=generator)
    if ties:  # as half precision makes them
        logits = (logits * 4 / scale).round()
    truth = torch.randint(501, (rows,), generator=generator)
    found, wanted = statistics(logits, truth), by_definition(logits, truth)
    for name, ours, theirs in zip(("log_prob", "mean", "std", "rank"), found, wanted):
        np.testing.assert_allclose(ours.double(), theirs.double(), atol=3e-5 * (1 + 4 * ties), rtol=1e-5, err_msg=name)
    assert torch.isnan(found[4]).all()


def test_impossible_tokens_add_nothing():
    logits = torch.full((1, 64), float("-inf"))
    logits[0, :2] = torch.tensor([0.0, 1.0])
    log_prob, mean, std, rank, _ = statistics(logits, torch.tensor([0]))
    wanted = by_definition(logits[:, :2], torch.tensor([0]))
    for ours, theirs in zip((log_prob, mean, std), wanted):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
    assert rank.item() == 1


def test_a_destroyed_model_gives_nan_and_not_numbers():
    logits = torch.randn(3, 64)
    logits[1, 7] = float("nan")
    log_prob, mean, std, *_ = statistics(logits, torch.tensor([0, 0, 0]))
    assert torch.isnan(torch.stack([log_prob, mean, std])[:, 1]).all()
    assert not torch.isnan(torch.stack([log_prob, mean, std])[:, [0, 2]]).any()


def test_mass_of_the_digits_where_the_true_token_is_one():
    logits, digits = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), torch.arange(20, 30)
    truth = torch.tensor([20, 3, 29, 30, 25])
    mass = statistics(logits, truth, digits)[4]
    wanted = torch.softmax(logits.double(), 1)[:, 20:30].sum(1).log()
    inside = torch.tensor([True, False, True, False, True])
    assert mass[inside].tolist() == pytest.approx(wanted[inside].tolist(), abs=1e-5)
    assert torch.isnan(mass[~inside]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same():
    logits, truth = torch.randn(40, 5000).bfloat16().float(), torch.randint(5000, (40,))
    for ours, theirs in zip(statistics(logits, truth)[:4], statistics(logits.cuda(), truth.cuda())[:4]):
        torch.testing.assert_close(ours, theirs.cpu(), atol=1e-4, rtol=1e-4)
