"""Mechanisms: the noise they state is what they add, and neighbours move what they release no further than stated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest

from geoquant.errors import UserError
from geoquant.lattice.basis import compensation_factor, metric_factor
from geoquant.lattice.unboxed import unboxed_babai
from geoquant.privacy.guarantee import shards, weight_ball
from geoquant.privacy.guarantee.adjacency import OneRecord, WeightBall, euclidean, in_metric, in_steps
from geoquant.privacy.guarantee.gaussian import gaussian_epsilon, gaussian_sigma
from geoquant.privacy.guarantee.provenance import Public, private
from geoquant.privacy.guarantee.shards import LowRank, aggregate
from geoquant.privacy.guarantee.weight_ball import as_float64, perturbed, product_error, release

PAIR = {"epsilon": 4.0, "delta": 1e-5}


def tensors(seed: int = 0, **shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def public(values: Mapping[str, torch.Tensor], source: str = "the base") -> dict[str, Public]:
    return {name: Public(value, source) for name, value in values.items()}


def upper(columns: int, seed: int = 0) -> torch.Tensor:
    """R with M = R^T R of condition number about a thousand."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) * torch.logspace(0, 1.5, columns)
    return torch.linalg.cholesky(x.T.double() @ x.double() / len(x), upper=True)


@pytest.fixture
def without_noise(monkeypatch):
    """What is released, less its noise: to see how far neighbours move it."""
    for module in (weight_ball, shards):
        monkeypatch.setattr(module, "drawn", lambda shape: np.zeros(shape, np.int64))


def test_isotropic_noise_has_the_stated_size_and_the_base_keeps_the_rest():
    base = tensors(a=(300, 200), b=(500,), c=(7,))
    tuned = {name: base[name] + 0.001 for name in ("a", "b")}
    found = release(private(tuned, "m"), public(base), WeightBall(0.02, euclidean()), **PAIR)
    sigma = found.guarantee.mechanism.sigma
    assert sigma == pytest.approx(gaussian_sigma(4.0, 1e-5, 0.02), rel=1e-5)
    noise = np.concatenate([((found.tensors[n].values - tuned[n]).numpy() / sigma).ravel() for n in tuned])
    assert kstest(noise, "norm").pvalue > 1e-5
    assert found.guarantee.scope.covered == ("a", "b")
    assert found.guarantee.scope.public == ("c",)
    assert set(found.tensors) == {"a", "b"}
    assert found.tensors["a"].values.dtype == torch.float32
    assert found.guarantee.epsilon == 4.0
    assert found.guarantee.mechanism.epsilon(1e-5) == pytest.approx(4.0, abs=1e-4)


def test_noise_of_all_tensors_together_is_one_gaussian():
    """The same sigma for one tensor and for its parts: squared distances add, and nothing is paid for the split."""
    whole = release(
        private(tensors(a=(400, 10)), "m"), public(tensors(a=(400, 10))), WeightBall(1.0, euclidean()), **PAIR
    )
    parts = {f"a{i}": (100, 10) for i in range(4)}
    split = release(private(tensors(**parts), "m"), public(tensors(**parts)), WeightBall(1.0, euclidean()), **PAIR)
    assert split.guarantee.mechanism.sigma == whole.guarantee.mechanism.sigma


def test_noise_in_public_steps_is_proportional_to_them():
    base = tensors(a=(200, 64), b=(3000,))
    steps = torch.logspace(-3, -1, 200)[:, None]
    norm = in_steps({"a": Public(steps, "steps of the base")})
    found = release(private(base, "m"), public(base), WeightBall(0.5, norm), **PAIR)
    sigma = found.guarantee.mechanism.sigma
    noise = (found.tensors["a"].values - base["a"]) / steps / sigma
    assert kstest(noise.numpy().ravel(), "norm").pvalue > 1e-5
    assert kstest(((found.tensors["b"].values - base["b"]) / sigma).numpy(), "norm").pvalue > 1e-5  # without steps
    assert "grid steps taken from steps of the base" in found.guarantee.sentence


def test_metric_noise_has_the_inverse_metric_as_covariance():
    columns, rows = 6, 60_000
    factor = upper(columns)
    base = {"a": torch.zeros(rows, columns)}
    norm = in_metric({"a": Public(factor, "public text, damping 1%")})
    found = release(private({"a": 0.01 * torch.ones(rows, columns)}, "m"), public(base), WeightBall(1.0, norm), **PAIR)
    sigma = found.guarantee.mechanism.sigma
    noise = (found.tensors["a"].values.double() - 0.01) / sigma
    # Whitened by R it is standard: every entry of the second moment within 5 deviations.
    second = (noise @ factor.T).T @ (noise @ factor.T) / rows
    assert (second - torch.eye(columns)).abs().max() < 5 * math.sqrt(2 / rows)
    inverse = torch.linalg.inv(factor.T @ factor)
    assert torch.allclose(noise.T @ noise / rows, inverse, rtol=0.05, atol=0.05 * inverse.abs().max())
    assert "covariance sigma^2 M^-1" in found.guarantee.sentence
    assert "public text, damping 1%" in found.guarantee.sentence


def test_metric_noise_then_babai_is_babai_with_noise_in_its_centres():
    """With A^-1 = U^T U, nearest plane on w + sigma xi U is nearest plane whose centres get sigma xi_j U_jj."""
    columns = 12
    x = torch.randn(100, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    metric, order = x.T @ x / 100, torch.arange(columns)
    inverse = compensation_factor(metric, order, 1e-9)
    generator = torch.Generator().manual_seed(3)
    weight, xi = (torch.randn(40, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    step, sigma = 0.3, 0.5
    codes = unboxed_babai(
        weight + sigma * xi @ inverse, metric_factor(metric, order, 1e-9), order,
        torch.ones(40, dtype=torch.float64), torch.full((columns,), step, dtype=torch.float64),
    )  # fmt: skip
    work = weight.clone()
    for j in range(columns):
        code = torch.round((work[:, j] + sigma * xi[:, j] * inverse[j, j]) / step)
        assert torch.equal(code, codes[:, j].double())
        error = (work[:, j] - code * step) / inverse[j, j]
        work[:, j:] -= error[:, None] * inverse[j, j:]


def test_neighbours_in_a_metric_are_no_further_apart_than_stated(without_noise):
    """Before noise, with the products' rounding: distances between releases against products in 50 digits."""
    rows, columns = 3, 40
    factor = upper(columns, 4)
    norm = in_metric({"a": Public(factor, "x")})
    rng = np.random.default_rng(0)
    sigma = 1e-3
    held = private({"a": torch.zeros(rows, columns)}, "m")
    for scale in (1e-6, 1e-2, 10.0):
        pair = rng.uniform(-scale, scale, (2, rows, columns))
        moved = [weight_ball.on_lattice(x @ factor.numpy().T, sigma) * sigma / 2.0**32 for x in pair]
        with mpmath.workdps(50):
            r = mpmath.matrix(factor.tolist())
            apart = mpmath.sqrt(sum(mpmath.norm(r * mpmath.matrix((a - b).tolist())) ** 2 for a, b in zip(*pair)))
        allowed = float(apart) + product_error(held, norm) + 1.5 * math.sqrt(rows * columns) * sigma / 2**32
        assert np.linalg.norm(moved[0] - moved[1]) <= allowed * (1 + 1e-12)
    assert product_error(held, norm) < 1e-8
    out = perturbed(torch.full((rows, columns), 0.25), torch.zeros(rows, columns), 1e-4, factor=factor.numpy())
    np.testing.assert_allclose(out, 0.25, atol=1e-10)
    with pytest.raises(UserError, match="too far from the base"):
        perturbed(torch.full((1, columns), 17.0), torch.zeros(1, columns), 1e-3, factor=factor.numpy())


def test_products_err_by_less_than_is_added_to_the_sensitivity():
    rows, columns = 5, 60
    factor = upper(columns, 1)
    change = np.random.default_rng(1).uniform(-weight_ball.BOUND, weight_ball.BOUND, (rows, columns))
    exact = [[sum(Fraction(a) * Fraction(b) for a, b in zip(w, r)) for r in factor.tolist()] for w in change.tolist()]
    found = (change @ factor.numpy().T).tolist()
    off = math.sqrt(sum(float(Fraction(a) - b) ** 2 for f, e in zip(found, exact) for a, b in zip(f, e)))
    allowed = product_error(private({"a": torch.zeros(rows, columns)}, "m"), in_metric({"a": Public(factor, "x")})) / 2
    assert 0 < off < allowed < 1e4 * off


def test_many_rows_are_released_some_at_a_time_alike(without_noise, monkeypatch):
    base = tensors(a=(50, 8), v=(9,))
    steps = torch.rand(50, 8, generator=torch.Generator().manual_seed(1)) + 0.1
    tuned = {name: value + 0.02 for name, value in base.items()}
    norm = in_steps({"a": Public(steps, "x")})
    settings = {"adjacency": WeightBall(0.1, norm), **PAIR}
    whole = release(private(tuned, "m"), public(base), **settings).tensors
    monkeypatch.setattr(weight_ball, "SLAB", 24)
    parts = release(private(tuned, "m"), public(base), **settings).tensors
    for name in base:
        assert torch.equal(whole[name].values, parts[name].values)
        assert torch.allclose(whole[name].values, tuned[name], atol=1e-6)


def test_weights_of_half_precision_are_taken_as_they_are(without_noise):
    base = {"a": tensors(a=(20, 8))["a"].to(torch.bfloat16)}
    tuned = {"a": (base["a"].float() + 0.01).to(torch.bfloat16)}
    found = release(private(tuned, "m"), public(base), WeightBall(0.1, euclidean()), **PAIR).tensors["a"].values
    assert torch.allclose(found, tuned["a"].float(), atol=1e-7)


def test_a_release_needs_a_base_of_the_same_names_and_shapes():
    held, ball = private(tensors(a=(3, 4)), "m"), WeightBall(0.1, euclidean())
    for base, words in (
        (tensors(b=(3, 4)), "has no tensor 'a'"),
        (tensors(a=(4, 3)), "another shape"),
    ):
        with pytest.raises(UserError, match=words):
            release(held, public(base), ball, **PAIR)
    with pytest.raises(TypeError, match="must be Public"):
        release(held, tensors(a=(3, 4)), ball, **PAIR)
    with pytest.raises(TypeError, match="must be Private"):
        release(tensors(a=(3, 4)), public(tensors(a=(3, 4))), ball, **PAIR)
    with pytest.raises(UserError, match="nothing to release"):
        release({}, public(tensors(a=(3, 4))), ball, **PAIR)
    two = {**private(tensors(a=(3, 4)), "one"), **private(tensors(b=(3, 4)), "two")}
    with pytest.raises(UserError, match="of several models; got one, two"):
        release(two, public(tensors(a=(3, 4), b=(3, 4))), ball, **PAIR)
    for factor, words in ((torch.eye(3), "does not fit"), (torch.ones(4, 4), "upper triangular")):
        with pytest.raises(UserError, match=words):
            release(held, public(tensors(a=(3, 4))), WeightBall(0.1, in_metric({"a": Public(factor, "x")})), **PAIR)
    broken = {"a": torch.full((3, 4), float("nan"))}
    with pytest.raises(UserError, match="NaN"):
        release(private(broken, "m"), public(tensors(a=(3, 4))), ball, **PAIR)


def changes(k: int, scale: float, seed: int = 0, rank: int = 0) -> list[dict]:
    """k shards' changes of two tensors; with a rank, the first of them as a product."""
    found = []
    for shard in range(k):
        values = {n: scale * v for n, v in tensors(100 * seed + shard, a=(12, 10), v=(9,)).items()}
        held = private(values, f"shard {shard}")
        if rank:
            pair = private(tensors(100 * seed + shard + 50, b=(12, rank), a=(rank, 10)), f"shard {shard}")
            held = {"a": LowRank(pair["b"], pair["a"], scale * 20), "v": held["v"]}
        found.append(held)
    return found


BASE = {"a": torch.zeros(12, 10), "v": torch.zeros(9), "fixed": torch.ones(3)}


def mean_of(found: list[dict], clip: float) -> dict[str, np.ndarray]:
    """The clipped mean as it is defined, in float64."""
    dense = []
    for shard in found:
        own = {}
        for name, change in shard.items():
            if isinstance(change, LowRank):
                own[name] = change.scale * as_float64(raw(change.b)) @ as_float64(raw(change.a))
            else:
                own[name] = as_float64(raw(change))
        norm = math.sqrt(sum((v**2).sum() for v in own.values()))
        dense.append({name: v * min(1.0, clip / norm) for name, v in own.items()})
    return {name: np.mean([d[name] for d in dense], axis=0) for name in dense[0]}


def raw(held):
    return held._Private__values


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("scale", [0.1, 30.0])  # within the clip, and far beyond it
def test_the_released_change_is_the_mean_of_clipped_changes(without_noise, rank, scale):
    clip, k = 1.0, 5
    shards_ = changes(k, scale, rank=rank)
    truth = mean_of(shards_, clip)
    found = aggregate(shards_, public(BASE), OneRecord(k, clip), **PAIR)
    for name, value in truth.items():
        np.testing.assert_allclose(found.tensors[name].values.numpy(), value, atol=1e-7)
    assert found.guarantee.scope.public == ("fixed",)
    assert "one of 5 disjoint shards" in found.guarantee.sentence


def test_noise_on_the_mean_has_the_stated_size():
    base = {"a": torch.zeros(300, 200)}
    k, clip = 4, 2.0
    held = [private({"a": torch.zeros(300, 200)}, f"{i}") for i in range(k)]
    found = aggregate(held, public(base), OneRecord(k, clip), **PAIR)
    sigma = found.guarantee.mechanism.sigma
    assert sigma == pytest.approx(gaussian_sigma(4.0, 1e-5, 2 * clip / k), rel=1e-5)
    assert kstest((found.tensors["a"].values.numpy() / sigma).ravel(), "norm").pvalue > 1e-5


def test_one_shard_moves_the_sum_no_further_than_stated_and_the_worst_case_is_reached(without_noise):
    k, clip = 3, 1.0
    sums = []
    for sign in (1.0, -1.0):  # a record that turns its shard's change around, and makes it huge
        own = changes(k, 1.0)
        own[1] = private({n: sign * 1e4 * v for n, v in tensors(7, a=(12, 10), v=(9,)).items()}, "turned")
        found = aggregate(own, public(BASE), OneRecord(k, clip), **PAIR)
        sums.append(torch.cat([found.tensors[n].values.double().flatten() for n in ("a", "v")]))
    apart = float((sums[0] - sums[1]).norm())
    assert apart <= 2 * clip / k * (1 + 1e-6)
    assert apart == pytest.approx(2 * clip / k, rel=1e-5)  # so C / k would be a lie


def test_what_is_released_does_not_depend_on_the_order_of_shards(without_noise):
    one = aggregate(changes(6, 5.0), public(BASE), OneRecord(6, 1.0), **PAIR)
    other = aggregate(changes(6, 5.0)[::-1], public(BASE), OneRecord(6, 1.0), **PAIR)
    for name in one.tensors:  # integers add up to the same, floats would not
        assert torch.equal(one.tensors[name].values, other.tensors[name].values)


def test_a_product_is_clipped_as_a_product(without_noise):
    """Factors of another size, the same product: the same release. Clipped by its factors it would differ."""
    k = 2
    found = []
    for by in (1.0, 1e3):
        own = []
        for shard in range(k):
            values = tensors(shard, b=(12, 2), a=(2, 10))
            pair = private({"b": values["b"] * by, "a": values["a"] / by}, f"shard {shard}")
            own.append({"a": LowRank(pair["b"], pair["a"], 100.0)})
        found.append(aggregate(own, public({"a": BASE["a"]}), OneRecord(k, 0.5), **PAIR).tensors["a"].values)
    assert torch.allclose(*found, atol=1e-6)
    assert float(found[0].norm()) > 0.1


def test_a_shared_public_factor_confines_the_noise_to_its_space(without_noise):
    """Shards that trained only B: the same clipped mean, whether A is known to be shared or not."""
    k, clip, right = 4, 0.5, tensors(9, a=(3, 10))["a"]
    factors = [private(tensors(s, b=(12, 3)), f"shard {s}")["b"] for s in range(k)]
    shared = Public(right, "drawn before training")
    found = [
        aggregate(own, public({"a": BASE["a"]}), OneRecord(k, clip), **PAIR)
        for own in (
            [{"a": LowRank(raw_again(b), shared, 30.0)} for b in factors],
            [{"a": LowRank(raw_again(b), Public(right, "the same"), 30.0)} for b in factors],
        )
    ]
    one, other = (out.tensors["a"].values for out in found)
    assert torch.allclose(one, other, atol=1e-6)
    assert float(one.norm()) > 0.1
    assert [out.guarantee.mechanism.slack.dimensions for out in found] == [12 * 3, 12 * 10]
    assert "space of a public right factor" in found[0].guarantee.sentence
    assert "space of a public right factor" not in found[1].guarantee.sentence


def raw_again(held):
    return private({"b": raw(held)}, held.origin.name)["b"]


def test_noise_in_a_shared_space_has_the_stated_size_and_stays_there():
    k, rank, rows, columns = 2, 4, 5000, 30
    shared = Public(tensors(1, a=(rank, columns))["a"], "drawn before training")
    zero = [{"a": LowRank(private({"b": torch.zeros(rows, rank)}, f"{s}")["b"], shared)} for s in range(k)]
    found = aggregate(zero, public({"a": torch.zeros(rows, columns)}), OneRecord(k, 1.0), **PAIR)
    noise = found.tensors["a"].values.double() / found.guarantee.mechanism.sigma
    basis = torch.linalg.qr(shared.values.double().T).Q
    assert kstest((noise @ basis).numpy().ravel(), "norm").pvalue > 1e-5
    assert (noise - noise @ basis @ basis.T).abs().max() < 1e-5


def test_shards_are_read_as_they_are_needed():
    """A mapping that loads its tensors; each is asked for four times at most: shape, space, norm, sum."""

    class Lazy(Mapping):
        def __init__(self, held):
            self.held, self.reads = held, 0

        def __getitem__(self, name):
            self.reads += 1
            return self.held[name]

        def __iter__(self):
            return iter(self.held)

        def __len__(self):
            return len(self.held)

    own = [Lazy(shard) for shard in changes(3, 1.0)]
    aggregate(own, public(BASE), OneRecord(3, 1.0), **PAIR)
    assert max(shard.reads for shard in own) <= 4 * 2


def test_shards_that_do_not_fit_are_refused():
    good, base = changes(3, 1.0), public(BASE)
    with pytest.raises(UserError, match="not as many shards as stated; got 3; wanted 4"):
        aggregate(good, base, OneRecord(4, 1.0), **PAIR)
    with pytest.raises(UserError, match="shard 1 changes other tensors"):
        aggregate([good[0], {"a": good[1]["a"]}, good[2]], base, OneRecord(3, 1.0), **PAIR)
    with pytest.raises(TypeError, match="must be Private"):
        aggregate([good[0], tensors(a=(12, 10), v=(9,)), good[2]], base, OneRecord(3, 1.0), **PAIR)
    with pytest.raises(UserError, match="takes no seed"):
        aggregate(good, base, OneRecord(3, 1.0), **PAIR, seed=0)
    bad = private({"a": torch.full((12, 10), float("inf")), "v": torch.zeros(9)}, "bad")
    with pytest.raises(UserError, match="NaN or infinity"):
        aggregate([good[0], bad, good[2]], base, OneRecord(3, 1.0), **PAIR)
    fresh = changes(3, 1.0)
    aggregate(fresh, base, OneRecord(3, 1.0), **PAIR)
    with pytest.raises(UserError, match="a second release adds"):
        aggregate(fresh, base, OneRecord(3, 1.0), **PAIR)


def test_one_record_costs_as_much_with_more_shards_at_less_noise():
    """Sensitivity 2 C / k: the same epsilon with a hundred times the shards at a hundredth of the noise."""
    few, many = OneRecord(10, 2.0), OneRecord(1000, 2.0)
    assert few.sensitivity == pytest.approx(0.4)
    assert gaussian_sigma(2.0, 1e-5, many.sensitivity) == pytest.approx(
        gaussian_sigma(2.0, 1e-5, few.sensitivity) / 100
    )
    assert gaussian_epsilon(1e-5, few.sensitivity / gaussian_sigma(2.0, 1e-5, few.sensitivity)) == pytest.approx(2.0)


def test_neighbours_on_the_lattice_by_chi_square_of_their_releases():
    """Two releases of the same weights differ by noise alone: their squared distance is 2 sigma^2 chi^2."""
    base = tensors(a=(100, 40))
    out = [release(private(base, "m"), public(base), WeightBall(0.1, euclidean()), **PAIR) for _ in range(2)]
    apart = (out[0].tensors["a"].values - out[1].tensors["a"].values).double() / out[0].guarantee.mechanism.sigma
    low, high = chi2.ppf([1e-5, 1 - 1e-5], 4000)
    assert low < float(apart.square().sum()) / 2 < high
