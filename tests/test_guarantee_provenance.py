"""Private weights reach nothing but a mechanism: each path into the lattice refuses them, wrapped or not."""

from __future__ import annotations

import ast
import copy
import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import geoquant
from geoquant.errors import UserError
from geoquant.lattice.basis import damped, metric_factor
from geoquant.lattice.grid import Grid, round_to_grid, search_scales
from geoquant.lattice.order import ORDERS, column_order
from geoquant.lattice.refit import refitted
from geoquant.lattice.unboxed import exponents, unboxed_babai
from geoquant.methods import METHODS
from geoquant.methods.dqc import hop_scores, kept_columns
from geoquant.methods.problem import Problem
from geoquant.privacy.guarantee.adjacency import WeightBall, euclidean
from geoquant.privacy.guarantee.provenance import Private, Public, Released, derive, private
from geoquant.privacy.guarantee.weight_ball import release

ROWS, COLUMNS = 6, 16
GRID = Grid(4, 8)


@pytest.fixture
def weight():
    return 0.1 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def held(weight):
    return private({"w": weight}, "the fine-tune")["w"]


@pytest.fixture
def metric():
    x = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(1))
    return Public(x.T @ x / 64, "moments of public text under the public base")


# What is computed on the way to a quantized layer, as a function of weights (w) and a public metric (h).
PATHS = {
    "scales": lambda w, h: search_scales(w, h, GRID),
    "codes": lambda w, h: round_to_grid(w, h, None, GRID),
    "refitted scales": lambda w, h: refitted(w, h, h, h, 8),
    "order": lambda w, h: column_order("activation", w, 8),
    "min-pivot order": lambda w, h: ORDERS["min-pivot"](w, 8),
    "metric": lambda w, h: damped(w, 0.01),
    "basis": lambda w, h: metric_factor(w, h, 0.01),
    "steps": lambda w, h: exponents(w),
    "lattice codes": lambda w, h: unboxed_babai(w, h, h, h, h),
    "kept columns": lambda w, h: kept_columns(w, 0.1),
    "scores": lambda w, h: hop_scores(w, h, 0.01),
    "allocation": lambda w, h: torch.topk(w.flatten(), 3),
    "torch": lambda w, h: torch.stack([h, w]),
    "numpy": lambda w, h: np.abs(np.asarray(w)),
    "operator": lambda w, h: h - w,
    "comparison": lambda w, h: w > 0,
    "index": lambda w, h: w[0],
    "number": lambda w, h: float(w),
    "iteration": lambda w, h: list(w),
    "attribute": lambda w, h: w.data,
}


@pytest.mark.parametrize("path", PATHS)
def test_no_function_of_the_lattice_takes_private_weights(path, held, metric):
    with pytest.raises(TypeError, match="is private: nothing may be computed from it"):
        PATHS[path](held, metric.values)
    with pytest.raises(TypeError, match="is private: nothing may be computed from it"):
        derive(PATHS[path], held, metric)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_solves_a_problem_of_private_weights(method, held, metric):
    with pytest.raises(TypeError, match="is private"):
        derive(Problem, weight=held, hessian=metric)
    with pytest.raises(TypeError, match="is private"):
        METHODS[method](Problem(weight=held, hessian=metric.values))
    with pytest.raises(TypeError, match="is private"):
        derive(METHODS[method], Problem(weight=held, hessian=metric.values))


def test_a_private_metric_is_refused_like_private_weights(weight):
    moments = private({"h": torch.eye(COLUMNS)}, "moments under the fine-tune")["h"]
    with pytest.raises(TypeError, match="h is private"):
        derive(Problem, weight=Public(weight, "the base"), hessian=moments)
    with pytest.raises(TypeError, match="h is private"):
        derive(column_order, "activation", moments, 8)


def test_the_whole_way_of_public_and_released_values(weight, metric):
    """What the door lets through computes what the functions compute, and says whose guarantee it is under."""
    base = Public(weight, "the base")
    scales = derive(search_scales, derive(torch.t, base), derive(torch.diagonal, metric), GRID)
    assert isinstance(scales, Public)
    assert scales.source == "the base and moments of public text under the public base"
    assert torch.equal(scales.values[0], search_scales(weight.T, metric.values.diagonal(), GRID)[0])
    order = derive(column_order, "activation", metric, 8)
    assert torch.equal(order.values, column_order("activation", metric.values, 8))

    out = release(private({"w": weight + 0.01}, "m"), {"w": base}, WeightBall(0.1, euclidean()), epsilon=8, delta=1e-5)
    problem = derive(Problem, weight=out.tensors["w"], hessian=metric, grid=GRID, order="activation", damping=0.01)
    for method in ("babai", "dqc"):
        solved = derive(METHODS[method], problem)
        assert isinstance(solved, Released)
        assert solved.guarantee is out.guarantee
        assert torch.equal(solved.values.codes, METHODS[method](problem.values).codes)
    kept = derive(kept_columns, derive(hop_scores, out.tensors["w"], metric, 0.01), 0.2)
    assert kept.guarantee is out.guarantee


def test_what_audits_catch_is_refused_by_construction(held, metric):
    """The broken mechanisms of test_guarantee_audit, written down as somebody would who uses this library."""
    base = {"w": Public(torch.zeros(ROWS, COLUMNS), "the base")}
    other = private({"w": torch.ones(ROWS, COLUMNS)}, "m")
    out = release(other, base, WeightBall(0.1, euclidean()), epsilon=8, delta=1e-5).tensors["w"]
    columns = torch.tensor([0, 5])
    broken = {
        "private scales": lambda: derive(lambda w: w.abs().amax(1) / 7, held),
        "private order": lambda: derive(torch.argsort, held),
        "kept columns without noise": lambda: derive(lambda q, w: q.index_copy(1, columns, w[:, columns]), out, held),
        "compensation from private weights": lambda: derive(lambda q, w, h: q + (w - q) @ h, out, held, metric),
        "noise on a private subset": lambda: derive(lambda q, w: torch.where(w.abs() > 0.1, q, w), out, held),
        "stochastic rounding": lambda: derive(lambda w: torch.floor(w + torch.rand(ROWS, COLUMNS)), held),
        "metric from private activations": lambda: derive(lambda h, w: h @ w.T @ w, metric, held),
    }
    for name, attempt in broken.items():
        with pytest.raises(TypeError, match="is private"):
            pytest.fail(f"{name}: {attempt()}")


def test_kept_columns_of_a_release_are_noised(weight, metric):
    """DQC on released weights keeps released columns: none of them is the private one."""
    base, held = {"w": Public(weight, "the base")}, private({"w": weight}, "m")
    out = release(held, base, WeightBall(1.0, euclidean()), epsilon=4, delta=1e-5)
    problem = derive(Problem, weight=out.tensors["w"], hessian=metric, grid=Grid(8, 8), keep=0.2, damping=0.01)
    solved = derive(METHODS["dqc"], problem).values
    apart = solved.kept_weight.float() - weight[:, solved.kept_index]
    assert solved.kept_index.numel() > 1
    assert 0.5 < float(apart.std()) / out.guarantee.mechanism.sigma < 2


def test_tensors_without_provenance_are_refused_however_they_come(weight, metric):
    public = Public(weight, "the base")
    ways = [
        lambda: derive(torch.add, public, weight),
        lambda: derive(torch.stack, [public, weight]),
        lambda: derive(functools.partial(torch.add, other=weight), public),
        lambda: derive(lambda w: w + weight, public),
        lambda: derive(weight.add, public),
        lambda: derive(np.add, public, np.ones(3)),
        lambda: derive(lambda w, other=weight: w + other, public),
        lambda: derive(METHODS["rtn"], Problem(weight=weight, hessian=metric.values)),
    ]
    for way in ways:
        with pytest.raises(TypeError, match="every tensor says where it is from"):
            way()


def test_the_same_of_private_weights(held, metric):
    for way in (
        lambda: derive(functools.partial(torch.add, other=held), metric),
        lambda: derive(lambda h: held.shape and h, metric),
        lambda: derive(torch.stack, [metric, held]),
        lambda: derive(torch.add, metric, {"other": held}),
    ):
        with pytest.raises(TypeError, match="is private"):
            way()


def test_values_cannot_be_relabelled(held, weight):
    with pytest.raises(TypeError, match="cannot be a public value"):
        Public(held, "the base")
    with pytest.raises(TypeError, match="cannot be a public value"):
        Public({"scales": [held]}, "the base")
    with pytest.raises(TypeError, match="carries the guarantee"):
        Released(weight, "epsilon 1")
    with pytest.raises(UserError, match="must say where it is from"):
        Public(weight, " ")
    with pytest.raises(TypeError, match="floating-point tensor"):
        Private([1.0], held.origin)


def test_nothing_is_shown_copied_or_written_to_disk(held):
    assert repr(held) == f"Private(w, shape=({ROWS}, {COLUMNS}), dtype=torch.float32)"
    for leak in (copy.copy, copy.deepcopy, pickle.dumps, hash, lambda x: f"{x:.3f}", lambda x: x.tolist()):
        with pytest.raises(TypeError):
            leak(held)
    assert not hasattr(held, "__array_interface__")


def test_looking_ends_every_guarantee_of_the_same_origin(weight):
    tensors, base = private({"a": weight, "b": weight}, "the fine-tune"), {n: Public(weight, "base") for n in "ab"}
    with pytest.raises(UserError, match="without a reason"):
        tensors["a"].declassify(" ")
    assert torch.equal(tensors["a"].declassify("a histogram for a talk"), weight)
    with pytest.raises(UserError, match=r"no guarantee.*the fine-tune.*a: a histogram for a talk"):
        release({"b": tensors["b"]}, base, WeightBall(0.1, euclidean()), epsilon=8, delta=1e-5)


def test_a_second_release_is_refused(weight):
    tensors, base = private({"a": weight, "b": weight}, "the fine-tune"), {n: Public(weight, "base") for n in "ab"}
    settings = {"epsilon": 8, "delta": 1e-5}
    release({"a": tensors["a"]}, base, WeightBall(0.1, euclidean()), **settings)
    with pytest.raises(UserError, match="a second release adds to the first"):
        release({"b": tensors["b"]}, base, WeightBall(0.1, euclidean()), **settings)


def test_two_guarantees_are_not_silently_one(weight):
    base = {"a": Public(weight, "base")}
    one, other = (
        release(private({"a": weight}, name), base, WeightBall(0.1, euclidean()), epsilon=8, delta=1e-5).tensors["a"]
        for name in ("one", "other")
    )
    with pytest.raises(UserError, match="would have to be added up"):
        derive(torch.add, one, other)


def test_only_mechanisms_open_private_weights():
    """Who imports the key, or reaches past it, in all of the library."""
    source = Path(geoquant.__file__).parent
    openers = set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and any(a.name == "open_for_mechanism" for a in node.names):
                openers.add(path.relative_to(source).as_posix())
            if isinstance(node, ast.Attribute) and node.attr == "_Private__values":
                openers.add(path.relative_to(source).as_posix())
            if isinstance(node, ast.Attribute) and node.attr == "declassify":
                openers.add(path.relative_to(source).as_posix())
    assert openers == {f"privacy/guarantee/{name}.py" for name in ("provenance", "weight_ball", "shards")}
