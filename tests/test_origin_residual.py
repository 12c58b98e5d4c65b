"""Lives of massive activations that were put there."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from geoquant.outliers.residual import boundary, cosines, lives, summarise_residuals

WINDOWS, LENGTH, HIDDEN, BLOCKS = 3, 12, 40, 8


def planted():
    """Noise, one coordinate alive after blocks 2 to 5 in two of three windows, one in the embeddings only, and one
    that never ends.
    """
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(WINDOWS, LENGTH, HIDDEN, generator=generator) for _ in range(BLOCKS + 1)]
    for index, size in zip((3, 4, 5, 6), (-5000.0, 8000.0, 7900.0, 6000.0)):
        states[index][:2, 4, 17] = size
    states[0][2, 9, 3] = 3000.0
    states[8][0, 1, 25] = 4000.0
    states[8][2, 7, 25] = -3900.0
    return states


def test_planted_lives_are_found():
    states = planted()
    boundaries = [boundary(list(state.split(2))) for state in states]
    first, second, third = lives(boundaries)
    assert (first.dimension, first.position, first.born, first.died, first.block) == (17, 4, 2, 6, 3)
    assert (first.peak, first.windows) == (8000.0, pytest.approx(2 / 3))
    assert first.lasted == pytest.approx(4 / 6)
    assert first.kept == pytest.approx(0.75)
    assert first.ratio == pytest.approx(8000 / states[4].abs().median().item())
    assert (second.dimension, second.born, second.died, second.lasted) == (25, 7, None, 1.0)
    assert (third.dimension, third.born, third.died, third.position) == (3, -1, 0, 9)
    assert lives(boundaries, 1e5) == ()
    assert len(lives(boundaries, 1e4)) == 1


def test_a_boundary_knows_its_largest():
    state = planted()[4]
    found = boundary([state[:2], state[2:]])
    assert found.largest == (8000.0, 0, 4, 17)
    assert found.typical == state.abs().median()
    torch.testing.assert_close(found.peaks, state.abs().amax(1))
    assert torch.equal(state.abs().gather(1, found.places[:, None])[:, 0], found.peaks)


def test_a_life_may_come_twice():
    states = planted()
    states[4][:2, 4, 17] = 1.0
    found = [life for life in lives([boundary([state]) for state in states]) if life.dimension == 17]
    assert [(life.born, life.died) for life in found] == [(4, 6), (2, 3)]


def test_tokens_that_hold_one_are_told_from_the_others():
    states = planted()
    boundaries = [boundary([state]) for state in states]
    turns = [cosines([one], [other]) for one, other in pairwise(states)]
    for turn, one, other in zip(turns, states, states[1:]):
        one, other = one.double(), other.double()
        expected = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
        torch.testing.assert_close(turn.double(), expected, rtol=0, atol=1e-5)
    found = summarise_residuals(boundaries, turns)
    held = torch.zeros(WINDOWS, LENGTH, dtype=torch.bool)
    held[0, 4] = held[1, 4] = held[0, 1] = held[2, 7] = held[2, 9] = True
    for block, turn in enumerate(turns):
        assert found.massive_cosine[block] == turn[held].median()
        assert found.ordinary_cosine[block] == turn[~held].median()
    assert found.dimension[4] == 17
    assert found.largest[4] == 8000
    text = found.finding()
    assert "dimension 17 is born in block 2 at position 4 in 67% of the windows" in text
    assert "dies in block 6" in text
    assert "2 more lives" in text


def test_noise_has_no_massive_activation_and_the_range_of_its_law():
    """Mean of 40 largest over median against the expected one: within four standard errors."""
    ratios = []
    for seed in range(40):
        state = torch.randn(2, 50, 100, generator=torch.Generator().manual_seed(seed))
        ratios.append(boundary([state]).ratios.max())
    found = summarise_residuals([boundary([state])] * 2, [cosines([state], [state])])
    ratios = torch.stack(ratios)
    assert abs(ratios.mean() - found.gaussian) < 4 * ratios.std() / 40**0.5
    assert found.lives == ()
    assert found.massive_cosine == (None,)
    assert found.ordinary_cosine[0] == pytest.approx(1, abs=1e-6)
    assert "no massive activation" in found.finding()
