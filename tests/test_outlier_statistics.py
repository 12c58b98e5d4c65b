"""Sums over tokens against loops, their identities, the jackknife, and a site with nothing left to find."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.outliers.context import null_context
from geoquant.outliers.score import Score, columns
from geoquant.outliers.scores import SCORES
from geoquant.outliers.statistics import (
    BINS,
    REACH,
    SMALL,
    Statistics,
    edges,
    left_out,
    summarise,
    total,
)
from geoquant.outliers.uncertainty import standard_errors
from oracles.jackknife import jackknife
from outlier_toy import IN, PARTS, TOKENS, toy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(tokens=40, inputs=5, outputs=3, seed=0):
    x = torch.randn(tokens, inputs, generator=generator(seed)) * torch.logspace(-2, 3, inputs)
    return x, torch.randn(tokens, outputs, generator=generator(seed + 1))


def same(one: Statistics, other: Statistics, scale: Statistics | None = None, but=()):
    """Equal up to rounding, measured by the largest entry of `scale`."""
    for field in fields(Statistics):
        if field.name in but:
            continue
        a, b = (torch.as_tensor(getattr(s, field.name), dtype=torch.float64) for s in (one, other))
        largest = torch.as_tensor(getattr(scale or other, field.name)).abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * largest, msg=lambda m, n=field.name: f"{n}: {m}")


# ---- sums


def test_sums_are_those_of_a_loop_over_tokens():
    x, g = sample()
    found = summarise(x, g, unit=2.0)
    expected = {name: torch.zeros_like(getattr(found, name)) for name in vars(found) if name not in ("tokens", "unit")}
    borders = edges(2.0).numpy()
    for inputs, gradients in zip(x, g, strict=True):
        expected["hessian"] += torch.outer(inputs, inputs)
        expected["weighted"] += gradients.norm() ** 2 * torch.outer(inputs, inputs)
        expected["output"] += gradients**2
        expected["fisher"] += torch.outer(gradients, inputs) ** 2
        expected["gradient"] += torch.outer(gradients, inputs)
        expected["fourth"] += inputs**4
        expected["largest"] = torch.maximum(expected["largest"], inputs.abs())
        for column, value in enumerate(inputs.tolist()):
            expected["silent"][column] += abs(value) < SMALL * 2.0
            expected["histogram"][column, np.clip(np.searchsorted(borders, value, "right") - 1, 0, BINS - 1)] += 1
    same(found, Statistics(tokens=40.0, unit=2.0, **expected))
    assert found.silent.sum() > 0  # or the threshold was not tested


def test_the_histogram_counts_every_token_once_whatever_its_size():
    x = torch.tensor([[0.0], [1e30], [-1e30], [1.0], [-1.0]])
    counts = summarise(x, torch.ones(5, 1), unit=1.0).histogram[0]
    assert counts.sum() == 5
    assert counts[0] == counts[-1] == counts[BINS // 2] == 1
    assert torch.equal(counts, counts.flip(0))
    assert edges(3.0)[-1].item() == pytest.approx(3 * np.sinh(REACH))


def test_a_unit_must_be_one():
    with pytest.raises(ValueError, match="unit=0"):
        summarise(*sample(), unit=0.0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 39), st.integers(1, 39))
def test_sums_of_parts_add_in_any_cut_and_can_be_left_out(seed, first, second):
    x, g = sample(seed=seed)
    low, high = sorted((first, second))
    whole = summarise(x, g, unit=1.0)
    cuts = [slice(0, low), slice(low, high), slice(high, 40)]
    parts = [summarise(x[cut], g[cut], unit=1.0) for cut in cuts if cut.stop > cut.start]
    same(total(parts), whole)
    same(total(parts[::-1]), whole)
    for left, cut in zip(left_out(parts), cuts if len(parts) == 3 else [c for c in cuts if c.stop > c.start]):
        kept = torch.ones(40, dtype=torch.bool)
        kept[cut] = False
        same(left, summarise(x[kept], g[kept], unit=1.0), scale=whole)


def test_what_is_left_without_a_massive_token_is_not_rounding():
    """One token of 10^4 leaves nothing of the others' fourth powers in a single-precision sum of all."""
    x, g = sample(seed=3)
    x[0] *= 1e4
    parts = [summarise(x[cut], g[cut], 1.0) for cut in (slice(0, 10), slice(10, 25), slice(25, 40))]
    exact = x[10:].double().pow(4).sum(0)
    assert ((total(parts).fourth - parts[0].fourth - exact).abs() > exact / 2).any()  # or nothing is tested
    left = next(left_out(parts))
    torch.testing.assert_close(left.fourth.double(), exact, rtol=1e-5, atol=0)
    quiet = x[10:].double()
    torch.testing.assert_close(left.hessian.double(), quiet.T @ quiet, rtol=1e-5, atol=1e-4)


def test_means_divide_by_tokens_and_survive_none():
    x, g = sample()
    found = summarise(x, g, 1.0)
    torch.testing.assert_close(found.mean("fourth"), x.pow(4).mean(0))
    (none,) = left_out([found])
    assert none.tokens == 0
    assert none.mean("hessian").isfinite().all()


# ---- standard errors


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.randn(24, 3, generator=generator(1))
    parts = [summarise(row[None], torch.ones(1, 1), 1.0) for row in x]
    found = jackknife(parts, lambda s: s.mean("hessian").diagonal())
    torch.testing.assert_close(found, x.square().std(0) / 24**0.5, rtol=1e-4, atol=0)
    assert jackknife(parts[:1], lambda s: s.mean("fourth")).isnan().all()


def test_the_jackknife_of_a_ratio_covers_the_truth_as_often_as_it_says():
    """Kurtosis of a uniform law, 300 texts of 16 parts: +- 2.131 SE is a 95% interval of Student's law, 15 degrees of
    freedom; a share outside [0.90, 0.99] of 300 has probability below 2e-3 at 95%."""
    inside = 0
    for seed in range(300):
        x = torch.rand(16, 100, 1, generator=generator(seed)) - 0.5  # E x^4 / (E x^2)^2 = 1.8
        parts = [summarise(part, torch.ones(100, 1), 1.0) for part in x]

        def ratio(s):
            return s.mean("fourth") / s.mean("hessian").diagonal().square()

        inside += int((ratio(total(parts)) - 1.8).abs() < 2.131 * jackknife(parts, ratio))
    assert 0.90 <= inside / 300 <= 0.99


def test_errors_of_many_scores_are_the_jackknife_and_add_over_texts():
    site = toy(1)
    by_text = {}
    for text in ("public", "private"):
        only = standard_errors(list(SCORES.values()), site.context, {text: site.parts[text]})
        by_text[text] = only
        for name in ("fisher", "hop_compensated") if text == "public" else ("fisher_private", "specificity"):
            score = SCORES[name]
            direct = jackknife(
                site.parts[text], lambda s, t=text, c=score: c.compute(replace(site.context, **{t: s}))
            )  # fmt: skip
            torch.testing.assert_close(only[name], direct, rtol=2e-3, atol=1e-3 * float(direct.max()))
    both = standard_errors(list(SCORES.values()), site.context, {t: site.parts[t] for t in ("public", "private")})
    for name, found in both.items():
        torch.testing.assert_close(found.square(), by_text["public"][name] ** 2 + by_text["private"][name] ** 2)
    assert not by_text["private"]["fisher"].any()  # private text does not enter it
    assert by_text["public"]["privacy_ratio"].any()
    assert not by_text["public"]["privacy_memory"].any()
    assert not both["change"].any()
    assert by_text["public"]["fisher_low_rank"].any()
    assert by_text["private"]["fisher_low_rank_private"].any()
    assert not by_text["public"]["fisher_low_rank_private"].any()
    one = standard_errors([SCORES["fisher"]], site.context, {"public": site.parts["public"][:1]})
    assert one["fisher"].isnan().all()


def test_errors_are_read_as_asked_and_needs_are_respected():
    site = toy(1)
    found = standard_errors([SCORES["hop_self"]], site.context, {"public": site.parts["public"]}, columns)
    expected = jackknife(
        site.parts["public"],
        lambda s: SCORES["hop_self"].compute(replace(site.context, public=s)).sum(0),
    )
    torch.testing.assert_close(found["hop_self"], expected, rtol=1e-3, atol=0)
    poor = replace(site.context, private=None)
    assert set(standard_errors(list(SCORES.values()), poor, {})) == {
        name for name, score in SCORES.items() if "private" not in score.needs
    }
    bad = replace(site.context, public_gradients=site.context.public_gradients[:3])
    with pytest.raises(ValueError, match="public text, but got 3, wanted 8"):
        standard_errors([SCORES["fisher"]], bad, {"public": site.parts["public"]})


def test_errors_are_about_the_spread_over_independent_texts():
    """Site values of 60 independent toys: the mean of the standard errors is within 30% of the values' own spread (the
    spread of 60 has itself an error of 9%, the mean of SEs from 8 parts one of 4%). All have one set of weights."""
    names = ["fisher", "hop_row", "kronecker_row", "fisher_private", "awq"]
    scores = [SCORES[name] for name in names]
    fixed = replace(toy(0).context, public_gradients=None, private_gradients=None)

    def whole(score: Score, values):
        return values.sum() if score.combine == "sum" else values.mean()

    values, errors = {name: [] for name in names}, {name: [] for name in names}
    for seed in range(60):
        x = torch.randn(2, PARTS, 32, IN, generator=generator(seed)) * torch.linspace(0.5, 2, IN)
        g = torch.randn(2, PARTS, 32, 12, generator=generator(1000 + seed))
        parts = {
            text: [summarise(*chunk, 1.0) for chunk in zip(a, b, strict=True)]
            for text, a, b in zip(("public", "private"), x, g, strict=True)
        }
        context = replace(fixed, **{text: total(own) for text, own in parts.items()})
        found = standard_errors(scores, context, parts, whole)
        for score in scores:
            values[score.name].append(whole(score, score.compute(context)))
            errors[score.name].append(found[score.name])
    for name in names:
        spread = torch.stack(values[name]).std()
        assert torch.stack(errors[name]).mean() / spread == pytest.approx(1, abs=0.3), name


# ---- nothing left to find


def test_the_null_has_the_moments_of_sampled_gaussians():
    """200,000 tokens drawn; of fourth moments their mean has a relative error of sqrt(96 / 9 / n) = 0.7%."""
    context = toy(2).context
    n = 200_000
    lower = torch.linalg.cholesky(context.public.hessian / context.public.tokens)
    x = torch.randn(n, IN, generator=generator(5)) @ lower.T
    g = torch.randn(n, 12, generator=generator(6)) * context.public.mean("output").sqrt()
    drawn = summarise(x, g, context.public.unit)
    null = null_context(context, generator(7)).public
    assert null.tokens == context.public.tokens
    for name in ("output", "fisher", "fourth"):
        torch.testing.assert_close(null.mean(name), drawn.mean(name), rtol=0.035, atol=0)
    for name in ("hessian", "weighted"):
        largest = drawn.mean(name).max().item()
        torch.testing.assert_close(null.mean(name), drawn.mean(name), rtol=0, atol=0.03 * largest)
    silent = torch.stack([null_context(context, generator(seed)).public.mean("silent") for seed in range(150)])
    torch.testing.assert_close(silent.mean(0), drawn.mean("silent"), rtol=0.2, atol=0)  # of 600 tokens or so
    counts = drawn.mean("silent") * context.public.tokens
    torch.testing.assert_close(silent.var(0) * context.public.tokens**2, counts, rtol=0.5, atol=0)
    most = torch.stack([x[start : start + 512].abs().amax(0) for start in range(0, 100 * 512, 512)]).mean(0)
    torch.testing.assert_close(null.largest, most, rtol=0.15, atol=0)


def test_the_null_counts_tokens_with_the_scatter_of_as_many():
    context = toy(2).context
    n = int(context.public.tokens)
    draws = torch.stack([null_context(context, generator(seed)).public.histogram for seed in range(200)])
    torch.testing.assert_close(draws.sum(2), torch.full(draws.shape[:2], float(n)), rtol=1e-5, atol=0)
    spread = context.public.mean("hessian").diagonal().sqrt()
    x = torch.randn(200, n, IN, generator=generator(8)) * spread
    sampled = torch.stack([summarise(part, torch.ones(n, 1), context.public.unit).histogram for part in x])
    torch.testing.assert_close(draws.mean(0), sampled.mean(0), rtol=0.03, atol=1.5)  # 200 draws of at most 100
    torch.testing.assert_close(draws.var(0), sampled.var(0), rtol=0.5, atol=4.0)


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_null_pulls_in_directions_of_the_inputs_only(in_parts):
    """1000 draws: covariances of gradients within 4.5 standard errors of what independence gives (45 are tested)."""
    context = toy(3).context
    inputs = 512 * torch.tensor([[1.0, 1.6, 0.0], [1.6, 4.0, -0.3], [0.0, -0.3, 0.5]])
    public = replace(
        context.public,
        hessian=inputs,
        output=context.public.output[:2] * torch.tensor([1.0, 9.0]),
        histogram=context.public.histogram[:3],
    )
    parts = torch.zeros(5, 2, 3) if in_parts else None
    small = replace(context, public=public, private=None, domain=None, public_gradients=parts)
    expected = torch.kron(torch.diag(public.output), inputs) / public.tokens
    sizes, chance = expected.diagonal().sqrt(), generator(16)
    nulls = [null_context(small, chance) for _ in range(1000)]
    drawn = [(torch.stack([null.public.gradient for null in nulls]), 1.0)]
    if in_parts:
        drawn.append((torch.stack([null.public_gradients[3] for null in nulls]), 1 / 5))
        torch.testing.assert_close(nulls[0].public_gradients.sum(0), nulls[0].public.gradient)
    for matrices, share in drawn:
        rows = matrices.flatten(1) / sizes / share**0.5
        off = rows.T @ rows / 1000 - expected / torch.outer(sizes, sizes)
        assert off.abs().max() < 4.5 * 2**0.5 / 1000**0.5
        assert rows.mean(0).abs().max() < 4 / 1000**0.5


def test_the_null_shuffles_weight_error_and_change_together():
    context = toy(4).context
    null = null_context(context, generator(9))

    def triples(c):
        return torch.stack([c.weight, c.delta, c.weight - c.base]).flatten(1)

    order = [found[0].argsort() for found in (triples(context), triples(null))]
    torch.testing.assert_close(triples(null)[:, order[1]], triples(context)[:, order[0]], rtol=0, atol=1e-6)
    assert (null.weight == context.weight).float().mean() < 0.05


@pytest.mark.parametrize("known", ["domain", "public"])
def test_private_text_of_the_null_is_unseen_text_of_its_kind_or_public_text(known):
    made = toy(5, plant="memory")
    context = replace(made.context, private=total(made.parts["private"][:3]))
    context = replace(context, domain=context.domain if known == "domain" else None)
    null = null_context(context, generator(10))
    other = getattr(context, known)
    assert null.private.tokens == context.private.tokens
    torch.testing.assert_close(null.private.mean("hessian"), other.mean("hessian"))
    torch.testing.assert_close(null.private.mean("output"), other.mean("output"))
    torch.testing.assert_close(null.private.mean("fisher"), getattr(null, known).mean("fisher"))
    few = getattr(null, known).silent.sum() * null.private.tokens / getattr(null, known).tokens
    assert abs(null.private.silent.sum() - few) < 5 * few**0.5
    assert (null.private.gradient - getattr(null, known).gradient).abs().max() > 0


def test_columns_and_sites_without_input_have_a_null():
    context = toy(6).context
    x = torch.randn(30, IN, generator=generator(11))
    x[:, 3] = 0
    for inputs in (x, torch.zeros(30, IN)):
        public = summarise(inputs, torch.randn(30, 12, generator=generator(12)), 1.0)
        null = null_context(replace(context, public=public, private=public, domain=None), generator(13))
        for text in (null.public, null.private):
            assert all(torch.as_tensor(value).isfinite().all() for value in vars(text).values())
            assert text.histogram[3, BINS // 2] == 30
            assert text.silent[3] == 30
            assert not text.gradient[:, 3].abs().max() > 1e-12
    (unseen,) = left_out([context.public])
    null = null_context(replace(context, public=unseen, public_gradients=None), generator(14))
    assert all(torch.as_tensor(value).isfinite().all() for value in vars(null.public).values())


def test_the_null_is_reproducible_and_leaves_its_input_alone():
    context = toy(7).context
    before = {name: value.clone() for name, value in vars(context.public).items() if isinstance(value, torch.Tensor)}
    weight = context.weight.clone()
    one, other = (null_context(context, generator(15)) for _ in range(2))
    same(one.public, other.public)
    assert torch.equal(one.weight, other.weight)
    assert all(torch.equal(getattr(context.public, name), value) for name, value in before.items())
    assert torch.equal(context.weight, weight)
    assert one.public.tokens == TOKENS * PARTS
