"""Costs of an error: against dense quadratic forms, solved-again least squares, autograd, explicit Kronecker products
and explicit matrices of per-sample gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from geoquant.outliers.nystrom import draw_landmarks, low_rank, low_rank_product, nystrom
from geoquant.outliers.score import columns, rows, site
from geoquant.outliers.scores import SCORES
from geoquant.outliers.scores.hop import DAMPING
from geoquant.outliers.statistics import summarise
from outlier_toy import IN, OUT, toy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(found, expected, rtol=1e-4):
    expected = torch.as_tensor(expected)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=1e-6 * scale)


def computed(name, context):
    return SCORES[name].compute(context)


# ---- HOP


@pytest.mark.parametrize("name", ["", "_weighted"])
def test_hop_is_the_output_error_over_the_tokens_themselves(name):
    made = toy(0)
    x, g = (part.double() for part in made.tokens["public"])
    delta = made.context.delta.double()
    weights = g.square().sum(1) if name else torch.ones(len(x), dtype=torch.float64)
    moved = x @ delta.T  # (tokens, out)
    close(computed(f"hop_row{name}", made.context), (weights[:, None] * moved.square()).mean(0))
    alone = (weights[:, None, None] * (x[:, None] * delta).square()).mean(0)
    close(computed(f"hop_self{name}", made.context), alone)
    close(columns(SCORES["hop_self"], computed(f"hop_self{name}", made.context)), alone.sum(0))


@pytest.mark.parametrize("name", ["", "_weighted"])
def test_the_compensated_error_is_what_is_left_after_solving_again(name):
    """The other columns are re-fitted by least squares on the tokens, with damping as further tokens `sqrt(d) e_k`."""
    made = toy(1)
    x, g = (part.double() for part in made.tokens["public"])
    delta = made.context.delta.double()
    roots = g.norm(dim=1, keepdim=True) if name else torch.ones(len(x), 1, dtype=torch.float64)
    tokens = roots * x / len(x) ** 0.5
    damping = DAMPING * (tokens.T @ tokens).diagonal().mean()
    tokens = torch.cat([tokens, damping.sqrt() * torch.eye(IN, dtype=torch.float64)])
    found = computed(f"hop_compensated{name}", made.context)
    for column in range(IN):
        others = [other for other in range(IN) if other != column]
        wrong = tokens[:, column, None] * delta[:, column]
        fit = torch.linalg.lstsq(tokens[:, others], -wrong).solution
        close(found[column], (wrong + tokens[:, others] @ fit).square().sum())
    damped = (tokens.T @ tokens).diagonal() * delta.square().sum(0)
    assert (found.double() < damped).all()  # or no column had any use of the others


def test_columns_that_copy_each_other_are_solved_in_double_precision(monkeypatch):
    """Two large copies and hardly any damping: single precision finds the metric indefinite."""
    monkeypatch.setattr("geoquant.outliers.scores.hop.DAMPING", 1e-9)
    made = toy(1)
    x, g = made.tokens["public"]
    x = torch.cat([1e3 * x[:, :1], 1e3 * x[:, :1], x[:, 2:]], 1)
    context = replace(made.context, public=summarise(x, g, 1.0))
    matrix = context.public.mean("hessian")
    damped = matrix.double() + 1e-9 * matrix.diagonal().mean() * torch.eye(IN)
    correlation = damped.float() / torch.outer(*[damped.diagonal().sqrt().float()] * 2)
    assert torch.linalg.cholesky_ex(correlation).info > 0
    found = computed("hop_compensated", context)
    expected = context.delta.double().square().sum(0) / torch.linalg.inv(damped).diagonal()
    torch.testing.assert_close(found[2:].double(), expected[2:], rtol=1e-3, atol=0)
    assert (found[:2] < 1e-3 * expected[2:].max()).all()  # either makes up for the other


def test_a_metric_that_rounding_left_indefinite_counts_below_zero_as_zero():
    """Eigenvalues 3 and -1, taken for 3 and 0, damped by 0.01."""
    context = toy(1).context
    public = replace(context.public, tokens=1.0, hessian=torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    found = computed("hop_compensated", replace(context, public=public, delta=torch.tensor([[1.0, 2.0]])))
    close(found, torch.tensor([1.0, 4.0]) / (0.5 / 3.01 + 0.5 / 0.01))


def test_weighted_hop_is_never_below_the_second_order_cost():
    made = toy(2, plant="shared")
    x, g = (part.double() for part in made.tokens["public"])
    cost = (g * (x @ made.context.delta.double().T)).sum(1).square().mean()
    assert site(SCORES["hop_row_weighted"], computed("hop_row_weighted", made.context)) > cost


# ---- Fisher


def toy_layer(tokens=50):
    """A softmax regression: gradients at the outputs of a linear layer, and each token's loss."""
    weight = torch.randn(OUT, IN, generator=generator(1), dtype=torch.float64) / 4
    x = torch.randn(tokens, IN, generator=generator(2), dtype=torch.float64)
    labels = torch.randint(OUT, (tokens,), generator=generator(3))

    def loss(w, t):
        return torch.nn.functional.cross_entropy((x[t] @ w.T)[None], labels[t, None])

    g = torch.softmax(x @ weight.T, 1) - torch.nn.functional.one_hot(labels, OUT)
    gradients = []
    for t in range(tokens):
        leaf = weight.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(leaf, t), leaf)[0])
    return weight, x, g, torch.stack(gradients)


@pytest.mark.parametrize("text", ["public", "private", "domain"])
def test_fisher_is_that_of_gradients_by_autograd(text):
    _, x, g, gradients = toy_layer()
    context = replace(toy(3).context, **{text: summarise(x.float(), g.float(), 1.0)})
    name = "fisher" if text == "public" else f"fisher_{text}"
    close(computed(name, context), gradients.square().mean(0) * context.delta.double().square() / 2)


def test_second_order_scores_agree_with_the_loss_where_they_should():
    """Labels drawn from the layer's own softmax: then the Fisher of all pairs of weights is the Hessian, and the loss
    itself, by finite difference, the truth. Factored scores see it to 15% on independent inputs of many tokens."""
    tokens = 20_000
    weight = torch.randn(OUT, IN, generator=generator(1), dtype=torch.float64) / 10
    x = torch.randn(tokens, IN, generator=generator(2), dtype=torch.float64)
    chances = torch.softmax(x @ weight.T, 1)
    labels = torch.multinomial(chances, 1, generator=generator(3))[:, 0]
    g = chances - torch.nn.functional.one_hot(labels, OUT)
    delta = 0.02 * torch.randn(OUT, IN, generator=generator(4), dtype=torch.float64)

    def loss(w):
        return -(chances * torch.log_softmax(x @ w.T, 1)).sum(1).mean()

    truth = loss(weight + delta) - loss(weight)
    context = replace(toy(4).context, public=summarise(x.float(), g.float(), 1.0), delta=delta.float())
    for name in ("fisher", "kronecker_row", "kronecker_weight", "kronecker_row_plain", "kronecker_weight_plain", "dsm"):
        assert site(SCORES[name], computed(name, context)).item() == pytest.approx(truth.item(), rel=0.15), name


# ---- Kronecker


@pytest.mark.parametrize(
    ("suffix", "text"), [("", "public"), ("_plain", "public"), ("_private", "private"), ("_domain", "domain")]
)
def test_kronecker_costs_are_those_of_the_explicit_product(suffix, text):
    made = toy(5, plant="coupling")
    x, g = (part.double() for part in made.tokens[text])
    delta = made.context.delta.double()
    output = g.square().mean(0)
    if suffix == "_plain":
        metric = torch.kron(torch.diag(output), x.T @ x / len(x))
    else:
        weighted = (x * g.square().sum(1, keepdim=True)).T @ x / len(x)
        metric = torch.kron(torch.diag(output) / output.sum(), weighted)
    flat = delta.flatten()
    close(computed(f"kronecker_row{suffix}", made.context).sum(), flat @ metric @ flat / 2)
    by_row = torch.stack([d @ m @ d / 2 for d, m in zip(delta, diagonal_blocks(metric), strict=True)])
    close(computed(f"kronecker_row{suffix}", made.context), by_row)
    found = computed(f"kronecker_weight{suffix}", made.context)
    close(found, (metric.diagonal() * flat.square() / 2).view_as(delta))
    close(rows(SCORES["kronecker_weight"], found).sum(), (metric.diagonal() * flat.square()).sum() / 2)


def diagonal_blocks(metric):
    return [metric[i * IN : (i + 1) * IN, i * IN : (i + 1) * IN] for i in range(OUT)]


def test_where_tokens_weigh_alike_both_factorings_agree():
    made = toy(6)
    x, g = made.tokens["public"]
    g = g / g.norm(dim=1, keepdim=True)
    context = replace(made.context, public=summarise(x, g, 1.0))
    close(computed("kronecker_row", context), computed("kronecker_row_plain", context))


# ---- low rank


def samples(n=9, seed=0, rank=None, scale=None):
    drawn = torch.randn(n, OUT, IN, generator=generator(seed), dtype=torch.float64)
    if rank is not None:
        drawn = torch.tensordot(
            torch.randn(n, rank, generator=generator(seed + 1), dtype=torch.float64), drawn[:rank], 1
        )
    return drawn if scale is None else drawn * scale


def dense(approximation):
    flat = approximation.vectors.flatten(1)
    return flat.T @ torch.diag(approximation.values) @ flat


def test_all_of_the_energy_is_the_explicit_fisher():
    _, _, _, gradients = toy_layer()
    flat = gradients.flatten(1)
    explicit = flat.T @ flat / len(flat)
    found = low_rank(gradients / len(flat) ** 0.5, energy=1.0)
    torch.testing.assert_close(dense(found), explicit)
    assert found.energy == pytest.approx(1)
    change = torch.randn(OUT, IN, generator=generator(5), dtype=torch.float64)
    torch.testing.assert_close(found.quadratic(change), change.flatten() @ explicit @ change.flatten())
    torch.testing.assert_close(found.apply(change).flatten(), explicit @ change.flatten())
    torch.testing.assert_close(found.diagonal().flatten(), explicit.diagonal())
    torch.testing.assert_close(
        found.vectors.flatten(1) @ found.vectors.flatten(1).T, torch.eye(len(found.values)).double()
    )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_the_rank_is_the_smallest_that_holds_the_energy(energy):
    drawn = samples(30, scale=torch.logspace(0, -2, 30, dtype=torch.float64)[:, None, None])
    found = low_rank(drawn, energy)
    values = torch.linalg.svdvals(drawn.flatten(1)).square()
    shares = values.cumsum(0) / values.sum()
    rank = len(found.values)
    assert shares[rank - 1] >= energy > (shares[rank - 2] if rank > 1 else 0)
    torch.testing.assert_close(found.values, values[:rank])
    assert found.energy == pytest.approx(shares[rank - 1].item())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 14), st.integers(2, 12))
def test_landmarks_give_the_textbook_formula_and_never_more_than_the_matrix(seed, count, n):
    drawn = samples(n, seed)
    flat = drawn.flatten(1)
    explicit = flat.T @ flat
    landmarks = draw_landmarks(drawn, count, generator(seed))
    assert len(set(landmarks.tolist())) == count
    found = dense(nystrom(drawn, landmarks, energy=1.0))
    block = explicit[landmarks][:, landmarks]
    sizes = torch.linalg.eigvalsh(block).flip(0)
    assume(sizes[min(count, n) - 1] > 1e-6 * sizes[0])  # else the textbook's inverse is not one
    textbook = explicit[:, landmarks] @ torch.linalg.pinv(block, rtol=1e-9, hermitian=True) @ explicit[landmarks]
    torch.testing.assert_close(found, textbook, rtol=0, atol=1e-6 * explicit.diagonal().max().item())
    left = torch.linalg.eigvalsh(explicit - found)
    assert left.min() > -1e-8 * explicit.diagonal().sum()
    if count >= n:  # as many landmarks as ranks
        torch.testing.assert_close(found, explicit, rtol=0, atol=1e-6 * explicit.diagonal().max().item())


@pytest.mark.parametrize("landmarks", [3, torch.tensor([7, 100, 33])])
def test_as_many_landmarks_as_the_rank_are_enough(landmarks):
    drawn = samples(12, seed=3, rank=3)
    found = nystrom(drawn, landmarks, generator(1), energy=1.0)
    flat = drawn.flatten(1)
    torch.testing.assert_close(dense(found), flat.T @ flat)
    assert len(found.values) == 3


def test_too_few_landmarks_say_how_much_they_reach():
    drawn = samples(20)
    found = nystrom(drawn, 5, generator(1))
    assert len(found.values) == 5
    assert found.energy == pytest.approx((found.values.sum() / drawn.square().sum()).item())
    assert 0.2 < found.energy < 0.8


def test_landmarks_are_drawn_by_the_diagonal_and_never_where_it_is_zero():
    """Weights 1 and 9 of 600 draws of one: 540 expected, spread 7.3, and four spreads allowed."""
    drawn = torch.zeros(2, 1, 4)
    drawn[0, 0, 1], drawn[1, 0, 3] = 1.0, 3.0
    chance = generator(2)
    found = [int(draw_landmarks(drawn, 1, chance)) for _ in range(600)]
    assert set(found) == {1, 3}
    assert abs(found.count(3) - 540) < 30
    assert set(draw_landmarks(drawn, 4, chance).tolist()) == {1, 3}


def test_nothing_has_no_directions_and_energies_are_shares():
    for found in (low_rank(torch.zeros(4, 2, 3)), nystrom(torch.zeros(4, 2, 3), 2, generator())):
        assert found.vectors.shape == (0, 2, 3)
        assert found.energy == 1
        assert not found.apply(torch.ones(2, 3)).any()
        assert not found.diagonal().any()
    with pytest.raises(ValueError, match=r"but got 1\.5"):
        low_rank(samples(), 1.5)
    with pytest.raises(ValueError, match="generator"):
        nystrom(samples(), 3)


@pytest.mark.parametrize("text", ["public", "private", "domain"])
def test_the_low_rank_score_is_the_quadratic_form_of_the_parts_gradients(text):
    made = toy(7, plant="shared")
    x, g = (part.double() for part in made.tokens[text])
    parts = torch.stack([b.T @ a for a, b in zip(x.split(64), g.split(64), strict=True)]).flatten(1)
    delta = made.context.delta.double().flatten()
    exact = (parts @ delta).square().sum() / len(x) / 2
    found = computed("fisher_low_rank" if text == "public" else f"fisher_low_rank_{text}", made.context)
    # What the last percent of the trace can hold of it.
    missing = 0.01 * parts.square().sum() / len(x) / 2 * delta.square().sum()
    assert exact - missing < found.double().sum() < exact * 1.0001
    whole = parts.T @ parts / len(x)
    values, vectors = torch.linalg.eigh(whole)
    keep = values.flip(0).cumsum(0) < 0.99 * values.sum()
    kept = vectors.flip(1)[:, : int(keep.sum()) + 1]
    truncated = kept @ torch.diag(values.flip(0)[: kept.shape[1]]) @ kept.T
    close(found, (delta * (truncated @ delta) / 2).view(OUT, IN), rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 6), energy=st.floats(0.3, 1.0), seed=st.integers(0, 10**6))
def test_the_product_is_that_of_the_low_rank_matrix(count, energy, seed):
    drawn = torch.randn(count, 5, 7, generator=generator(seed))
    change = torch.randn(5, 7, generator=generator(seed + 1))
    expected = low_rank(drawn, energy).apply(change)
    torch.testing.assert_close(low_rank_product(drawn, change, energy), expected, rtol=1e-3, atol=1e-4)
