"""Errors of numbers of weights: by leaving out rows in earnest, and as often right as they say; nulls of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis as reference
from scipy.stats import t as student

from geoquant.outliers.appraise import DRAWS, appraise
from geoquant.outliers.context import null_context, null_contexts
from geoquant.outliers.own_nulls import bell_weights, independent_inputs
from geoquant.outliers.sample import error_of_means, jackknifed, median_error
from geoquant.outliers.score import columns, rows, site
from geoquant.outliers.scores import SCORES
from geoquant.outliers.scores.kurtosis import kurtosis_without_one
from geoquant.outliers.statistics import metrics, summarise, total
from outlier_toy import IN, OUT, PARTS, toy

ALONE = [score for score in SCORES.values() if not score.texts]
by_name = pytest.mark.parametrize("score", ALONE, ids=[score.name for score in ALONE])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def read(score, context):
    """What `Score.error` is the error of."""
    values = score.compute(context)
    finest = columns(score, values)
    finest = rows(score, values) if finest is None else finest
    whole = site(score, values).reshape(1)
    return whole if finest is None else torch.cat([whole, finest])


def without_row(context, row):
    kept = torch.arange(len(context.weight)) != row
    return replace(context, **{name: getattr(context, name)[kept] for name in ("weight", "base", "delta")})


def test_every_score_has_an_error_of_one_kind_or_the_other():
    assert {score.name for score in SCORES.values() if score.error is not None} == {score.name for score in ALONE}
    assert len(ALONE) == 6


@by_name
def test_errors_have_the_shape_of_what_they_are_errors_of(score):
    context = toy(0).context
    assert score.error(context).shape == read(score, context).shape
    assert (score.error(context) > 0).all()


@pytest.mark.parametrize("name", ["change", "change_squared", "kurtosis", "kurtosis_column"])
def test_errors_are_those_of_leaving_out_rows_in_earnest(name):
    score, context = SCORES[name], toy(1).context
    left = torch.stack([read(score, without_row(context, row)) for row in range(OUT)]).double()
    if score.combine == "sum":
        left *= OUT / (OUT - 1)  # to the size of the whole
    expected = ((left - left.mean(0)).square().sum(0) * (OUT - 1) / OUT).sqrt()
    torch.testing.assert_close(score.error(context).double(), expected, rtol=1e-4, atol=0)


def test_rows_have_the_errors_of_leaving_out_columns():
    score, weight = SCORES["kurtosis_row"], toy(1).context.weight
    left = np.stack([reference(np.delete(weight.numpy(), column, 1), axis=1) for column in range(IN)])
    expected = np.sqrt(((left - left.mean(0)) ** 2).sum(0) * (IN - 1) / IN)
    found = score.error(toy(1).context)
    np.testing.assert_allclose(found[1:], expected, rtol=1e-4)
    whole = reference(weight.numpy(), axis=1)
    assert found[0].item() == pytest.approx(whole.std(ddof=1) / OUT**0.5, rel=1e-4)


def test_a_column_without_one_number_is_the_column_without_it():
    values = 100 + torch.randn(9, 3, generator=generator(2))
    values[:, 2] = 7.0
    left = torch.stack([torch.from_numpy(reference(np.delete(values.double().numpy(), i, 0))) for i in range(9)])
    torch.testing.assert_close(kurtosis_without_one(values)[:, :2], left[:, :2])
    assert not kurtosis_without_one(values)[:, 2].any()


@by_name
def test_the_interval_of_a_site_holds_the_truth_as_often_as_it_says(score):
    """Matrices of 60 rows, each of its own size, 150 times: intervals of 95% hold the mean of all in 88% or more, and
    not in all by being wide: the mean error is within 35% of the spread. Distortion: of 200 rows, 60 times, 80%,
    since rows share neighbours.
    """
    times, size, least = (60, 200, 0.80) if score.name == "distortion" else (150, 60, 0.88)
    context, chance = toy(2).context, generator(3)
    found = []
    for _ in range(times):
        sizes = 0.5 + torch.rand(size, 1, generator=chance)
        weight, change, delta = (sizes * torch.rand(size, IN, generator=chance) - sizes / 2 for _ in range(3))
        own = replace(context, weight=weight, base=weight - change, delta=0.1 * delta)
        found.append([site(score, score.compute(own)).item(), score.error(own)[0].item()])
    values, errors = np.array(found).T
    inside = np.abs(values - values.mean()) < student.ppf(0.975, 47) * errors
    assert inside.mean() >= least
    assert errors.mean() / values.std(ddof=1) == pytest.approx(1, abs=0.35)


def test_the_median_has_its_error():
    """300 samples of 48: 95% intervals hold the median of a skewed law in 90% to 99%."""
    values = -torch.rand(300, 48, generator=generator(4)).log()
    errors = torch.tensor([median_error(one) for one in values])
    inside = (values.median(1).values - np.log(2)).abs() < 2.01 * errors
    assert 0.90 <= inside.float().mean() <= 0.99


def test_too_few_have_no_error():
    assert error_of_means(torch.ones(1, 2)).isnan().all()
    assert jackknifed(torch.ones(1, 2)).isnan().all()
    assert np.isnan(median_error(torch.ones(3)))


# ---- draws of a null


def test_later_draws_are_as_good_as_the_first_and_scatter_like_independent_ones():
    """By score: means and spreads of 40 x 4 draws that share their noise against 160 that share nothing; 4 standard
    errors, of about 42 scores, and of a standard deviation 8% are one.
    """
    context = toy(3).context
    common = [score for score in SCORES.values() if score.null is null_contexts and not score.same]
    assert len(common) > 38
    shared, alone = generator(5), generator(6)

    def sites(empty):
        return torch.stack([site(score, score.compute(empty)) for score in common]).double()

    dealt = torch.stack([torch.stack([sites(one) for one in null_contexts(context, shared, 4)]) for _ in range(40)])
    fresh = torch.stack([sites(null_context(context, alone)) for _ in range(160)])
    spread = fresh.std(0)
    later = dealt[:, 1:].flatten(0, 1)
    loud = spread > 1e-6 * fresh.abs().mean(0)  # the others are the same in every draw, or nought
    assert ((later.mean(0) - fresh.mean(0)).abs() < 4 * spread * (1 / 120 + 1 / 160) ** 0.5)[loud].all()
    within = dealt.var(1).mean(0).sqrt()  # of the four that are used together
    assert loud.sum() > 34
    assert ((within / spread)[loud].log().abs() < 0.5).all()


def test_bell_weights_have_the_mean_the_variance_and_no_tails():
    context = replace(toy(1, "tail").context, weight=3 + torch.randn(200, 50, generator=generator(7)) ** 3)
    for one in bell_weights(context, generator(8), 2):
        assert one.weight.mean().item() == pytest.approx(context.weight.mean().item(), rel=0.1)
        assert one.weight.std().item() == pytest.approx(context.weight.std().item(), rel=0.05)
        assert abs(reference(one.weight.flatten().numpy())) < 5 * (24 / 10_000) ** 0.5


@pytest.mark.parametrize(("inputs", "tokens"), [(20, 512), (300, 900), (40, 25)])
def test_independent_inputs_score_as_such_inputs_do(inputs, tokens):
    """Against tokens that were drawn: the same means within 4 standard errors of 12 draws, and 3%."""
    energies = torch.linspace(0.5, 3, inputs)
    names = ("lattice_defect", "lattice_eta", "input_dimension")

    def seen(seed):
        x = torch.randn(tokens, inputs, generator=generator(seed)) * energies.sqrt()
        return summarise(x, torch.randn(tokens, 2, generator=generator(seed + 1)), 1.0)

    context = replace(toy(0).context, public=seen(0))
    mixed = context.public.hessian + 0.9 * torch.outer(*[context.public.hessian.diagonal().sqrt()] * 2)
    mixed.diagonal().copy_(context.public.hessian.diagonal())
    correlated = replace(context, public=replace(context.public, hessian=mixed))
    drawn = torch.tensor(
        [[SCORES[name].compute(one) for name in names] for one in independent_inputs(correlated, generator(9), 12)]
    )
    true = torch.tensor(
        [[SCORES[name].compute(replace(context, public=seen(seed))) for name in names] for seed in range(100, 124, 2)]
    )
    noise = ((drawn.var(0) + true.var(0)) / 12).sqrt()
    assert ((drawn.mean(0) - true.mean(0)).abs() < 4 * noise + 0.03 * true.mean(0).abs()).all()
    if tokens > inputs:  # or nothing would be told from anything
        assert SCORES["lattice_defect"].compute(correlated) > 1.5 * drawn[:, 0].max()


# ---- together


def nothing_to_find(seed):
    """A site that is its own null: Gaussian weights, errors, inputs and gradients, nothing knows of anything."""
    chance = generator(seed)
    weight, delta, change = (torch.randn(OUT, IN, generator=chance) for _ in range(3))
    parts = {}
    for text in ("public", "private", "domain"):
        x, g = torch.randn(PARTS, 64, IN, generator=chance), torch.randn(PARTS, 64, OUT, generator=chance)
        parts[text] = [summarise(*chunk, 1.0) for chunk in zip(x, g, strict=True)]
    context = replace(
        toy(0).context,
        **{"weight": weight, "delta": 0.1 * delta, "base": weight - change},
        **{text: total(own) for text, own in parts.items()},
        **{f"{text}_gradients": torch.stack([part.gradient for part in own]) for text, own in parts.items()},
        public_metrics=metrics(parts["public"]),
    )
    return context, parts


def test_sites_with_nothing_to_find_are_beyond_their_null_no_more_often_than_said():
    """25 sites under all scores, 1,150 findings that are not independent: at most 5% above and 5% below, against 2.5%
    each. Of columns of weights alone 1% are beyond, at most 2%; the null of others leaves out part of what chance does.
    """
    from geoquant.outliers.score_findings import surely

    signs, beyond, of = [], 0, 0
    for seed in range(25):
        context, parts = nothing_to_find(seed)
        for one in appraise(context, parts, SCORES.values(), seed=seed + 1000):
            if not one.score.same:
                told = {"value": one.site, "se": one.error, "null": one.null, "null_sd": one.null_spread}
                kind = {"error_over": "texts" if one.score.error is None else "rows"}
                signs.append(surely([(told, {"shape": [OUT, IN]})], kind, PARTS, DRAWS)[0])
            finest = one.rows if one.columns is None else one.columns
            assert (one.beyond is None) == (finest is None)
            if finest is not None and not one.score.texts:
                beyond, of = beyond + one.beyond, of + len(finest)
    signs = np.array(signs)
    assert len(signs) == 25 * 46
    assert (signs == 1).mean() < 0.05
    assert (signs == -1).mean() < 0.05
    assert 0.003 < beyond / of < 0.02
