"""Scores of tails, sizes, changes and texts: against scipy, the tokens themselves, and closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import kurtosis

from geoquant.outliers.context import null_context
from geoquant.outliers.score import columns, rows, site
from geoquant.outliers.scores import SCORES
from geoquant.outliers.scores.kurtosis import excess_kurtosis
from geoquant.outliers.scores.specificity import jensen_shannon
from geoquant.outliers.statistics import BINS, REACH, summarise
from outlier_toy import IN, OUT, toy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def computed(name, context):
    return SCORES[name].compute(context)


# ---- kurtosis


def test_kurtosis_of_weights_is_scipys():
    context = toy(0, plant="tail").context
    weight = context.weight.double().numpy()
    for name, axis in (("kurtosis", None), ("kurtosis_row", 1), ("kurtosis_column", 0)):
        np.testing.assert_allclose(computed(name, context), kurtosis(weight, axis=axis), rtol=1e-5, atol=1e-6)


def test_kurtosis_of_inputs_is_that_of_the_tokens_with_their_mirror_image():
    """About zero, that is: tokens and their negatives have mean zero."""
    made = toy(1, plant="coupling")
    x = made.tokens["public"][0].double().numpy()
    expected = kurtosis(np.concatenate([x, -x]))
    np.testing.assert_allclose(computed("kurtosis_input", made.context), expected, rtol=1e-4, atol=1e-4)
    assert expected.argmax() == 13


@settings(deadline=None)
@given(st.integers(2, 40), st.floats(-1e3, 1e3), st.floats(1.0, 1e3))
def test_kurtosis_knows_no_place_no_scale_and_its_limits(n, place, scale):
    values = torch.randn(n, generator=generator(n), dtype=torch.float64)
    found = excess_kurtosis(values)
    assert -2 - 1e-6 <= found <= n - 3 + 1e-6
    np.testing.assert_allclose(excess_kurtosis(place + scale * values), found, rtol=1e-3, atol=1e-3)
    assert excess_kurtosis(torch.full((n,), place)) == 0


# ---- sizes of inputs and weights


def test_salience_is_the_mean_size_to_a_few_percent():
    x = torch.randn(4000, IN, generator=generator(2)) * torch.logspace(-2, 1.5, IN)
    x[:, 3] = x[:, 3].abs()  # one side only
    x[:, 15] = 2 * torch.randn(4000, generator=generator(4)).pow(3)
    context = replace(toy(2).context, public=summarise(x, torch.ones(4000, OUT), 1.0))
    found, expected = computed("awq", context), x.abs().mean(0)
    wide = expected > 0.3
    torch.testing.assert_close(found[wide], expected[wide], rtol=0.03, atol=0)
    # A column within the bin about zero: its mean is known to be no larger than its root mean square.
    assert ((found >= 0.97 * expected) & (found <= 1.0001 * x.square().mean(0).sqrt()))[~wide].all()
    assert found[:8].tolist() == found[:8].sort().values.tolist()
    null = null_context(context, generator(3))
    gaussian = (2 / torch.pi) ** 0.5 * x.square().mean(0).sqrt()
    torch.testing.assert_close(computed("awq", null)[wide], gaussian[wide], rtol=0.05, atol=0)


def test_a_single_value_lies_in_its_bin_and_beyond_the_last_counts_as_in_it():
    values = torch.tensor([0.0, 0.11, 0.3, -0.7, -2.0, 50.0, -540.0])
    context = replace(toy(2).context, public=summarise(values[None], torch.ones(1, OUT), 1.0))
    assert ((computed("awq", context) - values.abs()).abs() <= 0.12 * (1 + values.square()).sqrt()).all()
    far = replace(context, public=summarise(torch.tensor([[1e6]]), torch.ones(1, OUT), 1.0))
    assert computed("awq", far) == pytest.approx((np.sinh(REACH) + np.sinh(REACH * (1 - 2 / BINS))) / 2, rel=1e-5)


def test_wanda_and_the_outlier_ratio_are_those_of_a_loop():
    made = toy(3, plant="input")
    x, weight = made.tokens["public"][0], made.context.weight
    norms = [x[:, j].norm().item() / len(x) ** 0.5 for j in range(IN)]
    expected = torch.tensor([[abs(weight[i, j].item()) * norms[j] for j in range(IN)] for i in range(OUT)])
    found = computed("wanda", made.context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    ratio = sum(value > 5 * expected.mean() for value in expected.flatten().tolist()) / expected.numel()
    outliers = computed("owl", made.context)
    assert 0.005 < ratio < 0.1
    assert site(SCORES["owl"], outliers).item() == pytest.approx(ratio)
    assert columns(SCORES["owl"], outliers).argmax() == 13


def test_owq_is_hop_under_another_name_and_sensitivity_its_mean_over_rows():
    context = toy(4).context
    hop, owq = computed("hop_self", context), computed("owq", context)
    torch.testing.assert_close(owq, columns(SCORES["hop_self"], hop))
    x, delta, weight = toy(4).tokens["public"][0], context.delta, context.weight
    errors, outputs = (x @ delta.T).square(), (x @ weight.T).square()
    found = site(SCORES["sensitivity"], computed("sensitivity", context))
    torch.testing.assert_close(found, errors.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        computed("sensitivity_relative", context), errors.sum() / outputs.sum(), rtol=1e-4, atol=0
    )  # fmt: skip
    silent = replace(context, weight=0 * weight, delta=0 * delta)
    assert computed("sensitivity_relative", silent) == 0


# ---- change and privacy


def test_changes_and_privacy_are_the_formulas():
    made = toy(5, plant="memory")
    context = made.context
    change = context.weight - context.base
    torch.testing.assert_close(computed("change", context), change.abs())
    torch.testing.assert_close(computed("change_squared", context), change**2)
    fishers = {}
    for text, (x, g) in made.tokens.items():
        fishers[text] = torch.einsum("ti,tj->ij", g.double() ** 2, x.double() ** 2) / len(x)
    square = change.double() ** 2
    excess = square * (fishers["private"] - fishers["public"]) / 2
    torch.testing.assert_close(computed("privacy_excess", context).double(), excess, rtol=1e-3, atol=1e-9)
    for name, other in (("privacy_ratio", "public"), ("privacy_memory", "domain")):
        below = fishers[other] + 0.1 * fishers[other].mean()
        expected = square * fishers["private"] / below
        torch.testing.assert_close(computed(name, context).double(), expected, rtol=1e-4, atol=0)


def test_the_excess_is_what_going_back_costs_private_text_beyond_public_text():
    """Gradients of one token each; going back is the error -dW, of each weight alone."""
    context = toy(6).context
    back = replace(context, delta=context.base - context.weight)
    expected = computed("fisher_private", back) - computed("fisher", back)
    torch.testing.assert_close(computed("privacy_excess", context), expected, rtol=1e-4, atol=1e-9)


# ---- texts


def test_specificity_is_scipys_distance():
    counts = torch.randint(0, 40, (2, 30, BINS), generator=generator(7)).float()
    counts[0, :, 20:40] = 0
    expected = [jensenshannon(p, q, base=2) for p, q in zip(*counts.double().numpy(), strict=True)]
    np.testing.assert_allclose(jensen_shannon(*counts), expected, rtol=1e-5)
    made = toy(7, plant="kind")
    found = computed("specificity", made.context)
    pairs = zip(made.context.private.histogram.numpy(), made.context.public.histogram.numpy(), strict=True)
    np.testing.assert_allclose(found, [jensenshannon(p, q, base=2) for p, q in pairs], rtol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 100))
def test_specificity_is_a_distance(seed, scale):
    p, q, r = torch.randint(0, 4, (3, 1, 7), generator=generator(seed)).float() + torch.eye(7)[:3, None]
    assert jensen_shannon(p, scale * p) == pytest.approx(0, abs=1e-4)
    assert jensen_shannon(p, q) == jensen_shannon(q, p)
    assert jensen_shannon(p, r) <= jensen_shannon(p, q) + jensen_shannon(q, r) + 1e-6
    assert 0 <= jensen_shannon(p, q) <= 1


def test_texts_with_nothing_in_common_are_one_apart_and_empty_ones_are_not():
    p = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0, 2.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    assert jensen_shannon(p, q).tolist() == [1.0, 0.0]


def test_two_samples_of_one_law_are_as_far_apart_as_the_null_says():
    """Gaussian texts: a distance between histograms is never zero. Means over 20 columns and 30 pairs of texts."""
    found, nulls = [], []
    for seed in range(30):
        made = toy(100 + seed)
        found.append(computed("specificity", made.context).mean())
        nulls.append(computed("specificity", null_context(made.context, generator(seed))).mean())
    found, nulls = torch.stack(found), torch.stack(nulls)
    assert found.mean() > 0.05
    assert (found.mean() - nulls.mean()).abs() < 0.1 * found.mean()


def test_alignment_is_the_cosine():
    made = toy(8, plant="shared")
    gradients = {}
    for text, (x, g) in made.tokens.items():
        gradients[text] = sum(torch.outer(b, a) for a, b in zip(x, g, strict=True))
    one, other = gradients["private"], gradients["public"]
    cosine = torch.nn.functional.cosine_similarity
    for name, expected in (
        ("alignment_column", cosine(one, other, dim=0)),
        ("alignment_row", cosine(one, other, dim=1)),
        ("alignment_site", cosine(one.flatten(), other.flatten(), dim=0)),
    ):
        torch.testing.assert_close(computed(name, made.context), expected, rtol=1e-4, atol=1e-5)


def test_the_sign_of_alignment_says_whether_one_step_serves_both_texts():
    """A small step down the private gradient lowers the public loss where the cosine is above zero, raises it below."""
    context = toy(9, plant="shared").context
    public = context.public.gradient
    for sign in (1.0, -1.0):
        private = replace(context.private, gradient=sign * context.private.gradient)
        cosine = computed("alignment_site", replace(context, private=private))
        change = (public * (-1e-3 * private.gradient)).sum()  # of the public loss
        assert cosine * change < 0
        assert cosine * sign > 0.3


def test_alignment_of_unrelated_texts_is_as_wide_as_the_null_says():
    """Inputs in three directions of twenty: a cosine over twenty weights spreads as one over three, 0.58 and not 0.22.
    40 sites of 12 rows; both spreads are known to about 5%."""
    found, nulls = [], []
    mixing = torch.randn(3, IN, generator=generator(10))
    fixed = toy(10).context
    for seed in range(40):
        texts = {}
        for index, text in enumerate(("public", "private", "domain")):
            chance = generator(1000 * index + seed)
            x, g = torch.randn(200, 3, generator=chance) @ mixing, torch.randn(200, OUT, generator=chance)
            texts[text] = summarise(x, g, 1.0)
        context = replace(fixed, **texts)
        found.append(computed("alignment_row", context))
        nulls.append(computed("alignment_row", null_context(context, generator(seed))))
    found, nulls = torch.cat(found), torch.cat(nulls)
    assert found.square().mean().sqrt() > 0.45
    assert (nulls.square().mean() / found.square().mean()).sqrt().item() == pytest.approx(1, abs=0.2)
    assert rows(SCORES["alignment_row"], found[:OUT]) is not None
