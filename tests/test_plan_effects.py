"""What units would change: rounding against simulated errors, the table's file, and what it gives to the choice."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

from conftest import tiny_llama
from geoquant.errors import UserError
from geoquant.lattice.basis import damped
from geoquant.methods.babai import DEFAULT_DAMPING
from geoquant.model.vocabulary import vocabulary
from geoquant.model.walk import walk
from geoquant.observe.texts import Sequences
from geoquant.plan.allocate import allocate
from geoquant.plan.chosen import choice, read_plan
from geoquant.plan.effects import Effects, Rounding, UnitEffects, options
from geoquant.plan.rate import Forecast
from geoquant.plan.rounding import Factors, log2_step_at, rounding_at, stage_roundings
from oracles.models import tokens_for

RATES = (2.0, 3.0, 4.0)


def factors(seed: int, columns: int = 6, rows: int = 5, tokens: int = 300) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    g = 0.1 * torch.randn(tokens, rows, generator=generator) * torch.rand(rows, generator=generator)
    found = Factors(torch.zeros(columns, columns), torch.zeros(rows))
    for start in (0, 100):  # two batches of two sites that read the same
        part = slice(start, start + 100 if start == 0 else tokens)
        found.add(x[part], g[part, :2], slice(0, 2), first=True)
        found.add(x[part], g[part, 2:], slice(2, rows), first=False)
    return found


def test_factors_are_those_of_all_tokens():
    found = factors(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    g = 0.1 * torch.randn(300, 5, generator=generator) * torch.rand(5, generator=generator)
    energy = g.square().sum(1)
    torch.testing.assert_close(found.metric, torch.einsum("t,ti,tj->ij", energy, x, x) / energy.sum())
    torch.testing.assert_close(found.curvature, g.square().mean(0))


def test_costs_of_rounding_are_those_of_simulated_errors():
    """Uniform errors inside the cells of the public lattice, in any text's metric."""
    public, private = factors(0), factors(1)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 6, generator=generator)
    found = rounding_at(weight, {"public": public, "private": private}, [2, 3], (2.0, 9.0))[0]
    basis = torch.linalg.cholesky(damped(public.metric, DEFAULT_DAMPING))  # V of any order has the same covariance
    mean = torch.cat([part.mean().expand(len(part)) for part in public.curvature.split([2, 3])])
    rows = (public.curvature + 0.05 * mean).rsqrt()
    inside = torch.rand(40000, 5, 6, generator=generator) - 0.5
    errors = found.step * rows[:, None] * torch.linalg.solve(basis.T, inside[..., None]).squeeze(-1)
    for text, own in (("public", public), ("private", private)):
        costs = 0.5 * torch.einsum("o,noi,ij,noj->n", own.curvature, errors, own.metric, errors)
        assert found.change[text] == pytest.approx(costs.mean().item(), rel=0.02)


def test_finer_rates_cost_less_as_their_steps_shrink():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = rounding_at(weight, {"public": factors(0, columns=64, rows=64)}, [64], (9, 10, 11))
    assert [one.bits for one in found] == [9, 10, 11]
    for coarse, fine in pairwise(found):
        ratio = (coarse.step / fine.step) ** 2
        assert coarse.change["public"] == pytest.approx(ratio * fine.change["public"])
        assert ratio == pytest.approx(4, rel=1e-6)  # one bit halves the step


@pytest.mark.parametrize("bits", [9.0, 7.0, 5.5, 3.25, 2.0, 0.6])
def test_steps_are_the_inverse_of_the_forecast(bits):
    known = Forecast((-6.0, -3.0, -1.0, 0.0, 2.0), (7.0, 4.0, 2.5, 2.0, 0.5), 100)
    assert known.at(log2_step_at(known, bits)) == pytest.approx(bits)


def test_what_no_step_reaches_gets_the_coarsest():
    assert log2_step_at(Forecast((-1.0, 0.0), (3.0, 2.0), 1), 1.0) == 0.0


def test_rates_below_what_a_step_reaches_are_not_offered():
    """Of a small matrix the bytes beside the codes alone are more."""
    weight, own = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), {"public": factors(0)}
    lowest = rounding_at(weight, own, [5], (0.5,))
    assert len(lowest) == 1
    assert lowest[0].bits > 16 * 11 / 30
    assert rounding_at(weight, own, [5], (0.5, lowest[0].bits + 1, 12.0))[0].bits == lowest[0].bits + 1


def test_every_stage_of_a_model_has_its_roundings():
    """One pass with texts of several lengths, embedding included; the sites of a stage are one."""
    model = tiny_llama()
    public = tokens_for(4, 24)
    blocks = walk(model, public[:1])
    blocks += (vocabulary(model, len(blocks)),)
    texts = {
        "public": Sequences(public, torch.full((4,), 24), 2),
        "private": Sequences(tokens_for(2, 16), torch.tensor([16, 9]), 1),
    }
    found = stage_roundings(model, blocks, texts, RATES)
    assert list(found) == [stage.name for block in (*reversed(blocks[:-1]), blocks[-1]) for stage in block.stages]
    for name, own in found.items():
        assert [one.bits for one in own] == sorted({one.bits for one in own})
        assert own[-1].bits == RATES[-1]
        for one in own:
            assert set(one.change) == {"public", "private"}
            assert all(value > 0 and math.isfinite(value) for value in one.change.values()), name


# ---- the table and the plan


def table() -> Effects:
    def unit(name, change, weights, rounding, stage):
        private = tuple(-3 * value for value in change)
        return UnitEffects(
            name,
            "mlp_in",
            0,
            (f"{name}.weight",),
            stage,
            weights,
            {"public": change, "private": private, "domain": change},
            {"public": (0.1, 0.1, 0.0)},
            rounding,
        )

    rounding = tuple(Rounding(b, 1.0, dict.fromkeys(("public", "private", "domain"), 4.0**-b)) for b in RATES)
    return Effects(
        (0.0, 0.5, 1.0),
        {"public": (3.0, 2.9, 2.8), "private": (3.0, 1.5, 1.0), "domain": (3.1, 2.5, 2.4)},
        (unit("a", (0.3, 0.1, 0.0), 100, rounding, "a"), unit("rest", (-0.1, -0.05, 0.0), 10, (), None)),
        {"model": "m", "base": "b", "texts": {"public": "t"}},
    )


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "effects.json"
    table().save(path)
    assert Effects.load(path) == table()
    assert Effects.load(path).sha256 == table().sha256
    told = json.loads(path.read_text())
    told["units"][0]["change"]["public"][0] = 0.2
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="damaged or was changed"):
        Effects.load(path)
    del told["units"][0]["weights"]
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="no table of effects: 'weights'"):
        Effects.load(path)


def test_the_gap_is_counted_from_that_of_the_base():
    assert table().gap == pytest.approx((2.4 - 1.0) - (3.1 - 3.0))
    assert table().missed("public") == pytest.approx((0.3 - 0.1) - (3.0 - 2.8))


def test_options_are_all_shares_with_all_rates():
    first, rest = options(table())
    assert [one.labels for one in first.options] == [
        {"share": share, "bits": bits} for share in (1.0, 0.5, 0.0) for bits in RATES
    ]
    coarse = first.options[6]  # share 0, 2 bits
    rounded = 4.0**-2
    assert coarse.costs == {
        "size": 200.0,
        "public": 0.3 + rounded,
        "domain": 0.3 + rounded,
        "leak": pytest.approx(4 * 0.3),
    }
    assert [one.labels for one in rest.options] == [{"share": share, "bits": None} for share in (1.0, 0.5, 0.0)]
    assert {one.costs["size"] for one in rest.options} == {160.0}


def test_the_plan_file_says_what_was_chosen(tmp_path):
    budgets = {"size": 360.0, "leak": 1.0}
    made = choice(allocate(options(table()), budgets), table(), {"public": 0.5, "domain": 0.5}, budgets)
    made.write(tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json")
    assert read == made
    assert read.bits == {"a": 2.0}
    assert read.shares == {"a.weight": 1.0, "rest.weight": 0.0}
    assert read.sha256 == {"model": "m", "base": "b", "effects": table().sha256}
    assert read.totals["size"] == 360
    read.check("m", "b")
    for hashes, line in ((("x", "b"), "another model"), (("m", None), "got no base"), (("m", "x"), "another one")):
        with pytest.raises(UserError, match=line):
            read.check(*hashes)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda told: told.update(schema=7), "has schema 7; wanted 1"),
        (lambda told: told["units"][0].update(share=1.5), "unit 0 is none; wanted name, stage, parameters, share"),
        (lambda told: told["units"][1].update(bits=0), "unit 1 is none"),
        (lambda told: told["units"][1].pop("name"), "unit 1 is none"),
        (lambda told: told["units"][1].update(parameters=["a.weight"]), "a parameter twice"),
        (lambda told: told["sha256"].pop("base"), "a hash missing"),
        (lambda told: told.pop("totals"), "lacks 'totals'"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, change, line):
    path, budgets = tmp_path / "plan.json", {"size": 500.0}
    choice(allocate(options(table()), budgets), table(), {"public": 1.0}, budgets).write(path)
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=line):
        read_plan(path)
