"""What every score must keep, and what is planted must come first."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from geoquant.outliers.context import SiteContext, null_context
from geoquant.outliers.score import columns, groups, rows, site
from geoquant.outliers.scores import SCORES
from geoquant.outliers.statistics import Statistics, nothing_of, total
from outlier_toy import COLUMN, IN, OUT, PARTS, ROW, toy

ALL = list(SCORES.values())
SIGNED = {name for name in SCORES if name.startswith(("kurtosis", "alignment", "fisher_low_rank"))} | {
    "privacy_excess",
    "input_dimension",
}
OPTIONAL = [field.name for field in fields(SiteContext) if field.default is None]
AXES = {"weight": (OUT, IN), "column": (IN,), "row": (OUT,), "site": ()}
by_name = pytest.mark.parametrize("score", ALL, ids=[score.name for score in ALL])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(context: SiteContext) -> dict[str, torch.Tensor]:
    found = {}
    for field in fields(SiteContext):
        value = getattr(context, field.name)
        if isinstance(value, Statistics):
            found |= {f"{field.name}.{name}": torch.as_tensor(part) for name, part in vars(value).items()}
        elif isinstance(value, torch.Tensor):
            found[field.name] = value
    return found


# ---- the contract


@by_name
def test_shape_numbers_and_names(score):
    values = score.compute(toy(0).context)
    assert values.shape == AXES[score.axis]
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert score.name in SIGNED or (values >= 0).all()
    assert score.combine in ("sum", "mean")
    assert score.title
    assert set(score.needs) <= set(OPTIONAL)
    assert SCORES[score.name] is score


@by_name
def test_scores_are_pure_and_leave_their_input_alone(score):
    context = toy(1).context
    before = {name: value.clone() for name, value in tensors(context).items()}
    first, again = score.compute(context), score.compute(context)
    assert torch.equal(first, again)
    after = tensors(context)
    assert all(torch.equal(before[name], after[name]) for name in before)
    first += 1  # nor is what they return a view of it
    assert all(torch.equal(before[name], value) for name, value in tensors(context).items())


@by_name
def test_a_score_reads_nothing_that_it_does_not_name(score):
    context = toy(2).context
    bare = replace(context, **{name: None for name in OPTIONAL if name not in score.needs})
    assert bare.has(score.needs)
    assert torch.equal(score.compute(bare), score.compute(context))
    for name in score.needs:
        assert not replace(context, **{name: None}).has(score.needs)


@by_name
def test_a_score_names_the_texts_that_enter(score):
    """Another text in the place of one, its gradients with it: the numbers change, or they do not."""
    context, other = toy(2).context, toy(3, "input").context
    expected = score.compute(context)
    for text in ("public", "private", "domain"):
        names = (text, f"{text}_gradients", *(["public_metrics"] if text == "public" else []))
        swapped = score.compute(replace(context, **{name: getattr(other, name) for name in names}))
        assert torch.equal(swapped, expected) == (text not in score.texts)


@by_name
def test_what_a_larger_part_has_is_what_its_parts_have(score):
    values = score.compute(toy(3).context)
    whole = site(score, values)
    assert whole.shape == ()
    tight = {"rtol": 1e-4, "atol": 1e-5 * values.abs().max().item()}
    join = torch.sum if score.combine == "sum" else torch.mean
    torch.testing.assert_close(whole, join(values), **tight)
    for read, axis, size in ((columns, "column", IN), (rows, "row", OUT)):
        found = read(score, values)
        assert (found is None) == (score.axis not in ("weight", axis))
        if found is not None:
            assert found.shape == (size,)
            torch.testing.assert_close(join(found), whole, **tight)
    parts = groups(score, values, 8)  # 20 columns: the last group has four
    assert (parts is None) == (score.axis not in ("weight", "column"))
    if parts is not None:
        assert parts.shape[-1] == 3
        assert torch.equal(parts[..., 2], join(values[..., 16:], -1))
        sizes = torch.tensor([8, 8, 4]) if score.combine == "mean" else torch.full((3,), 1.0)
        weighed = parts * sizes / (IN if score.combine == "mean" else 1)
        rest = weighed.sum(-1)
        torch.testing.assert_close(rest.mean() if score.combine == "mean" else rest.sum(), whole, **tight)


@by_name
def test_a_text_that_says_all_twice_says_nothing_else(score):
    """Scores are of means: the number of tokens is none of their business."""
    made = toy(4)
    twice = {text: total([*parts, *parts]) for text, parts in made.parts.items()}
    pulls = {
        f"{text}_gradients": torch.stack([part.gradient for part in parts] * 2) for text, parts in made.parts.items()
    }
    doubled = replace(made.context, **twice, **pulls)
    expected = score.compute(made.context)
    torch.testing.assert_close(score.compute(doubled), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


POWERS = {  # of the units of inputs and of outputs, and of that of the loss
    "": (0, 0, 0),
    "input": (1, 0, 0),
    "output": (0, 1, 0),
    "weight": (-1, 1, 0),
    "squared weight": (-2, 2, 0),
    "squared output per token": (0, 2, 0),
    "nats per token": (0, 0, 2),  # a Fisher: squared gradients, which count as a second derivative
    "squared nats per token": (0, 0, 2),
}


@by_name
def test_the_unit_is_the_one_it_says(score):
    """Inputs, outputs and the loss measured in other units; the same text, the same model."""
    expected = score.compute(toy(5).context)
    for a, b, c in ((4.0, 1.0, 1.0), (1.0, 8.0, 1.0), (1.0, 1.0, 2.0)):
        changed = toy(5, x_scale=a, w_scale=b / a, g_scale=c / b).context
        powers = POWERS[score.unit]
        factor = a ** powers[0] * b ** powers[1] * c ** powers[2]
        found = score.compute(changed) / factor
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@by_name
def test_silence_has_a_score_too(score):
    """No token at all, no input at all, one dead column, a site that rounds exactly and has not moved."""
    context = toy(6).context
    nothing = {text: nothing_of(getattr(context, text)) for text in ("public", "private", "domain")}
    still = replace(context, weight=0 * context.weight, delta=0 * context.delta, base=0 * context.weight)
    for silent in (replace(context, **nothing), still, replace(still, **nothing)):
        values = score.compute(silent)
        assert values.shape == AXES[score.axis]
        assert values.isfinite().all()


@by_name
def test_what_is_left_of_a_text_has_a_score(score):
    """Of few tokens, in single precision: metrics that rounding has left a little indefinite."""
    for seed in range(7, 12):
        made = toy(seed)
        own = made.parts["public"][0]
        less = {name: getattr(own, name).clone() for name in ("hessian", "weighted")}
        for metric in less.values():
            values, vectors = torch.linalg.eigh(metric)
            values[:3] = -0.02 * metric.diagonal().mean()
            metric.copy_(vectors * values @ vectors.T)
            metric.diagonal().clamp_min_(0)
            assert torch.linalg.eigvalsh(metric)[0] < -0.01 * metric.diagonal().mean()
        values = score.compute(replace(made.context, public=replace(own, **less)))
        assert values.isfinite().all()
        assert score.name in SIGNED or (values >= 0).all()


@by_name
def test_every_score_has_a_null(score):
    values = score.compute(null_context(toy(8).context, generator(8)))
    assert values.shape == AXES[score.axis]
    assert values.isfinite().all()


# ---- what is planted


ERROR = {
    *("dsm", "fisher", "fisher_private", "fisher_domain", "hop_self", "hop_compensated", "hop_self_weighted"),
    *("hop_compensated_weighted", "kronecker_weight", "kronecker_weight_plain", "owq"),
    *("kronecker_weight_private", "kronecker_weight_domain"),
}
PLANTS = {
    "error": ERROR,
    "coupling": {"fisher", "hop_self_weighted", "kronecker_weight", "kurtosis_input"},
    "tail": {"kurtosis_column", "wanda", "owl"},
    "memory": {"change", "change_squared", "privacy_ratio", "privacy_excess", "privacy_memory"},
    "kind": {"specificity"},
    "shared": {"alignment_column"},
}
# Of the plants that a score cannot see by what it says it measures, one each.
BLIND = {
    "error": {"wanda", "owl", "awq", "kurtosis_column", "kurtosis_input", "change", "privacy_ratio", "specificity"},
    "coupling": {"hop_self", "owq", "kronecker_weight_plain", "dsm", "wanda", "change"},
    "tail": {"hop_self", "fisher", "kurtosis_input", "specificity", "change", "awq"},
    "memory": {"fisher", "hop_self", "awq", "wanda", "kurtosis_column"},
    "kind": {"hop_self", "fisher", "kurtosis_column", "change", "alignment_column"},
    "shared": {"hop_self", "owq", "kurtosis_column", "change", "specificity"},
}


def first(score, context):
    return int(columns(score, score.compute(context)).argmax())


CASES = [(plant, name) for plant, names in PLANTS.items() for name in sorted(names)]


@pytest.mark.parametrize(("plant", "name"), CASES)
def test_what_is_planted_comes_first_and_not_on_the_null(plant, name):
    """On five sites. On 20 nulls the column comes first by chance once; more than five times with p < 1e-3."""
    score = SCORES[name]
    contexts = [toy(seed, plant).context for seed in range(5)]
    assert [first(score, context) for context in contexts] == [COLUMN] * 5
    chance = generator(11)
    nulls = [first(score, null_context(context, chance)) for context in contexts for _ in range(4)]
    assert nulls.count(COLUMN) <= 5


@pytest.mark.parametrize(("plant", "name"), [(plant, name) for plant, names in BLIND.items() for name in sorted(names)])
def test_what_a_score_does_not_measure_does_not_come_first(plant, name):
    """Ten sites; by chance the column comes first in half of one, in four or more with p = 1e-3."""
    assert [first(SCORES[name], toy(seed, plant).context) for seed in range(10)].count(COLUMN) <= 3


@pytest.mark.parametrize("name", ["awq", "wanda", "hop_self", "hop_compensated", "fisher", "dsm", "kronecker_weight"])
def test_what_inputs_of_equal_covariance_explain_is_on_the_null_too(name):
    """A column of large inputs comes first for the reason that its inputs are large: no more than that is found."""
    context = toy(3, "input").context
    assert first(SCORES[name], context) == COLUMN
    chance = generator(12)
    assert [first(SCORES[name], null_context(context, chance)) for _ in range(5)] == [COLUMN] * 5


def test_planted_rows_and_weights_are_found():
    for seed in range(5):
        memory = toy(seed, "memory").context
        for name in ("change", "privacy_ratio", "privacy_excess", "privacy_memory"):
            found = SCORES[name].compute(memory)
            assert divmod(int(found.argmax()), IN) == (ROW, COLUMN), name
            assert int(rows(SCORES[name], found).argmax()) == ROW, name
        assert int(SCORES["kurtosis_row"].compute(toy(seed, "tail").context).argmax()) == ROW
        quiet = toy(seed).context
        loud = replace(quiet, delta=quiet.delta * (1 + 4 * (torch.arange(OUT) == ROW))[:, None])
        for name in (
            "hop_row",
            "hop_row_weighted",
            "kronecker_row",
            "kronecker_row_plain",
            "sensitivity",
            "kronecker_row_domain",
        ):
            assert int(SCORES[name].compute(loud).argmax()) == ROW, name


def test_sites_with_more_to_find_have_more():
    for name, plant in (
        ("kurtosis", "tail"),
        ("alignment_site", "shared"),
        ("sensitivity_relative", "error"),
        ("fisher_low_rank", "error"),
    ):
        plain, planted = (site(SCORES[name], SCORES[name].compute(toy(1, p).context)) for p in ("", plant))
        assert planted > 1.5 * plain, name


def test_going_along_with_the_parts_costs_more_than_going_across():
    """The low-rank Fisher sees the direction of an error; no diagonal does."""
    context = toy(2, "shared").context
    pull = context.public_gradients.mean(0)
    along = 0.1 * pull / pull.norm()
    signs = torch.randint(0, 2, along.shape, generator=generator(13)) * 2.0 - 1
    costs = {
        name: [
            site(SCORES[name], SCORES[name].compute(replace(context, delta=delta)))
            for delta in (along, along.abs() * signs)
        ]
        for name in ("fisher_low_rank", "fisher")
    }
    assert costs["fisher_low_rank"][0] > 5 * costs["fisher_low_rank"][1]
    torch.testing.assert_close(*costs["fisher"])
    assert len(context.public_gradients) == PARTS
