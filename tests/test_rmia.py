"""RMIA against its definition as a double loop over plain probabilities, and where the loss attack must fail."""

from __future__ import annotations

import numpy as np
import pytest

from geoquant.errors import UserError
from geoquant.privacy.attacks.rmia import fit_slope, log_ratio, score
from geoquant.privacy.statistics import auc
from membership_toy import toy


def naive(target, reference, z_target, z_reference, outside, gamma, slope):
    def ratio(value, others):
        p_out = np.mean([np.exp(v) for v in others])
        p = ((slope * p_out + 1 - slope) + p_out) / 2
        return np.exp(value) / p

    found = []
    for i in range(len(target)):
        x = ratio(target[i], [reference[k, i] for k in range(len(reference)) if outside[k, i]])
        wins = [x / ratio(z_target[j], z_reference[:, j]) >= gamma for j in range(len(z_target))]
        found.append(np.mean(wins))
    return np.array(found)


def language_toy(seed, n=1000, m=1000, models=4):
    """Log-probabilities per token between about -7 and -2; population of the same kind, seen by nobody."""
    t = toy(seed, n=n + m, models=models, spread=0.9, offset=-5.0, varied=False)
    unseen = t.difficulty[n:] + t.noise[n:] * np.random.default_rng([seed, 1]).normal(size=(models + 1, m))
    cap = lambda values: np.minimum(values, -0.01)  # noqa: E731
    return t, cap(t.target[:n]), cap(t.shadow[:, :n]), cap(unseen[0]), cap(unseen[1:]), t.member[:n], ~t.inside[:, :n]


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("slope", [0.0, 0.4, 1.0])
def test_it_is_the_double_loop(gamma, slope):
    rng = np.random.default_rng(0)
    target, reference = -rng.exponential(1, 40), -rng.exponential(1, (3, 40))
    z_target, z_reference = -rng.exponential(1, 31), -rng.exponential(1, (3, 31))
    outside = np.arange(3)[:, None] != rng.integers(0, 3, 40)  # two of three models did not see a record
    found = score(target, reference, z_target, z_reference, outside=outside, gamma=gamma, slope=slope)
    np.testing.assert_allclose(found, naive(target, reference, z_target, z_reference, outside, gamma, slope))
    everywhere = np.ones_like(outside)
    np.testing.assert_allclose(
        score(target, reference, z_target, z_reference, gamma=gamma, slope=slope),
        naive(target, reference, z_target, z_reference, everywhere, gamma, slope),
    )


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_the_loss_attack_where_difficulty_decides(seed):
    _, target, reference, z_target, z_reference, member, outside = language_toy(seed)
    found = score(target, reference, z_target, z_reference, outside=outside)
    raw = auc(target[member], target[~member])
    assert raw < 0.72
    assert auc(found[member], found[~member]) > raw + 0.06
    # The threshold says what it means: non-members dominate a uniform share of the population.
    assert np.mean(found[~member] >= 0.9) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 500 + 0.09 / 1000))


def test_the_population_calibrates_but_does_not_separate():
    _, target, reference, z_target, z_reference, member, outside = language_toy(0)
    found = score(target, reference, z_target, z_reference, outside=outside)
    ratio = log_ratio(target, reference, outside=outside)
    assert (np.diff(found[np.argsort(ratio)]) >= 0).all()
    assert auc(found[member], found[~member]) == pytest.approx(auc(ratio[member], ratio[~member]), abs=2e-3)
    # A high gamma ties most records at 0.
    strict = score(target, reference, z_target, z_reference, outside=outside, gamma=8.0)
    assert (strict == 0).mean() > 0.2
    assert auc(strict[member], strict[~member]) < auc(found[member], found[~member])


def test_a_slope_for_images_undoes_the_calibration_of_texts():
    _, target, reference, z_target, z_reference, member, outside = language_toy(1)
    values = {}
    for slope in (1.0, 0.3):
        found = score(target, reference, z_target, z_reference, outside=outside, slope=slope)
        values[slope] = auc(found[member], found[~member])
    assert values[1.0] > values[0.3] + 0.05
    assert values[0.3] == pytest.approx(auc(target[member], target[~member]), abs=0.02)


def test_one_reference_and_slope_one_order_records_as_the_reference_attack_does():
    rng = np.random.default_rng(2)
    target, reference = -rng.exponential(1, 50), -rng.exponential(1, (1, 50))
    np.testing.assert_allclose(log_ratio(target, reference), target - reference[0], atol=1e-12)


def test_without_members_it_finds_nothing():
    values = []
    for seed in range(40):
        _, target, reference, z_target, z_reference, _, outside = language_toy(seed, n=400, m=300)
        fake = np.random.default_rng([2, seed]).random(400) < 0.5
        found = score(target, reference, z_target, z_reference, outside=outside)
        values.append(auc(found[fake], found[~fake]))
    assert np.mean(values) == pytest.approx(0.5, abs=4 * 0.029 / np.sqrt(40))


def test_the_slope_is_the_line_through_certainty():
    rng = np.random.default_rng(3)
    p_out = rng.random(2000) * 0.8
    p_in = np.clip(0.6 * p_out + 0.4 + 0.02 * rng.normal(size=2000), 1e-6, 1)
    assert fit_slope(np.log(p_in), np.log(p_out)) == pytest.approx(0.6, abs=0.005)
    assert fit_slope(np.log(p_out), np.log(p_out)) == pytest.approx(1.0)
    assert fit_slope(np.zeros(5), np.full(5, -1.0)) == 0.0
    with pytest.raises(UserError, match="slope cannot be fitted"):
        fit_slope(np.zeros(3), np.zeros(3))


def test_hard_texts_do_not_underflow_and_unscored_records_stay_out():
    target = np.array([-2000.0, -1999.0, -np.inf])
    reference = np.array([[-2000.0, -2000.0, -np.inf], [-2001.0, -2001.0, -np.inf]])
    found = score(target, reference, np.array([-5.0, -np.inf]), np.array([[-5.0, -np.inf], [-5.0, -np.inf]]))
    np.testing.assert_array_equal(found, [1.0, 1.0, -np.inf])
    assert log_ratio(target, reference)[1] - log_ratio(target, reference)[0] == pytest.approx(1.0)


def test_mistakes_are_named():
    good = -np.ones(4)
    with pytest.raises(UserError, match="population records that none"):
        score(good, good[None], np.array([]), np.empty((1, 0)))
    with pytest.raises(UserError, match="did not see it"):
        score(good, good[None], good, good[None], outside=np.zeros((1, 4), bool))
    with pytest.raises(UserError, match="needs log-probabilities"):
        score(-good, good[None], good, good[None])
    with pytest.raises(UserError, match="every reference model's score"):
        score(good, good[None, :2], good, good[None])
    with pytest.raises(UserError, match="gamma > 0"):
        score(good, good[None], good, good[None], gamma=0)
    with pytest.raises(UserError, match="between 0 and 1"):
        score(good, good[None], good, good[None], slope=1.5)
