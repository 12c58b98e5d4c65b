"""Solved stages on disk: what is written comes back, site by site, with the numbers of its report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from geoquant.errors import UserError
from geoquant.lattice.basis import NotPositiveDefinite
from geoquant.lattice.grid import Grid
from geoquant.lattice.sphere import CUBE_DB, POINTS
from geoquant.methods import METHODS, Problem
from geoquant.model.walk import Block, Site, Stage
from geoquant.observe.moments import MassiveTokens, Moments
from geoquant.plan.uniform import SitePlan
from geoquant.results import BABAI_ONLY, SiteFiles, load_stage, save_stage, site_reports, stage_path
from geoquant.solve import StageResult, _solve

ROWS = {"q": 5, "k": 3, "o": 4}
COLUMNS = 20
STAGES = (
    Stage("b.0.q", tuple(Site(f"b.0.{n}", 0, (ROWS[n], COLUMNS), "attention_in", "b.0.q") for n in "qk")),
    Stage("b.0.o", (Site("b.0.o", 0, (ROWS["o"], COLUMNS), "attention_out", "b.0.o"),)),
)
BLOCKS = (Block(0, "b.0", STAGES),)


def plans(**changes) -> dict[str, SitePlan]:
    values = {
        "kind": "other",
        "block": 0,
        "method": "babai",
        "bits": 4,
        "group_size": 8,
        "symmetric": True,
        "order": "activation",
        "damping": None,
        "keep": 0.0,
        "bits_per_weight": 6.4,
        "reason": "uniform",
    } | changes
    return {s.name: SitePlan(name=s.name, shape=s.shape, **values) for stage in STAGES for s in stage.sites}


def solved(stage: Stage, method: str = "babai", *, heldout: bool = True, **options) -> StageResult:
    generator = torch.Generator().manual_seed(len(stage.sites))
    x = torch.randn(100, COLUMNS, generator=generator)
    weight = torch.randn(stage.rows, COLUMNS, generator=generator)
    moments = Moments(x[:80].T @ x[:80], x[80:].T @ x[80:] if heldout else None, 80, 20, MassiveTokens(9.0, 0.3))
    problem = Problem(weight, moments.hessian, moments.heldout, **{"grid": Grid(4, 8), "order": "activation"} | options)
    return StageResult(stage, METHODS[method](problem), moments, weight, {"observe": 0.5, "solve": 0.25})


CASES = {
    "symmetric": ("babai", {}),
    "asymmetric": ("babai", {"grid": Grid(3, 8, symmetric=False)}),
    "kept columns": ("dqc", {"keep": 0.15}),
    "rounded": ("rtn", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_comes_back_bit_by_bit(case, tmp_path):
    method, options = CASES[case]
    for stage in STAGES:
        result = solved(stage, method, **options)
        save_stage(tmp_path, result, plans(method=method))
        found = load_stage(tmp_path, stage)
        assert found.grid == result.solution.grid
        assert found.damping == result.solution.damping
        for name in [
            "codes",
            "scales",
            "zero_points",
            "kept_index",
            "kept_weight",
            "gram_schmidt",
            "saturated",
            "column_scores",
        ]:
            wanted, got = getattr(result.solution, name), getattr(found, name)
            assert (wanted is None) == (got is None), name
            if wanted is not None:
                assert wanted.dtype == got.dtype
                assert torch.equal(wanted, got), name


@pytest.mark.parametrize("case", CASES)
def test_sites_are_read_one_by_one_and_put_together_are_their_stage(case, tmp_path):
    method, options = CASES[case]
    results = [solved(stage, method, **options) for stage in STAGES]
    for result in results:
        save_stage(tmp_path, result, plans(method=method))
    files = SiteFiles(tmp_path, BLOCKS)
    assert list(files) == ["b.0.q", "b.0.k", "b.0.o"]
    assert len(files) == 3
    # Out of order too, so that no file is left open on the wrong stage.
    parts = {name: files[name].dequantize() for name in ("b.0.o", "b.0.k", "b.0.q")}
    assert torch.equal(torch.cat([parts["b.0.q"], parts["b.0.k"]]), results[0].solution.dequantize())
    assert torch.equal(parts["b.0.o"], results[1].solution.dequantize())
    with pytest.raises(KeyError):
        files["b.0.v"]


def test_a_stage_that_was_not_solved_is_none_and_a_damaged_one_is_named(tmp_path):
    assert load_stage(tmp_path, STAGES[0]) is None
    save_stage(tmp_path, solved(STAGES[0]), plans())
    path = stage_path(tmp_path, STAGES[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"b\.0\.q\.safetensors.*delete it and run the same command again"):
        load_stage(tmp_path, STAGES[0])


def test_the_report_of_each_site_speaks_of_its_own_rows(tmp_path):
    results = [solved(stage) for stage in STAGES]
    for result in results:
        save_stage(tmp_path, result, plans())
    entries, warnings, seconds = site_reports(tmp_path, BLOCKS)
    assert [entry["name"] for entry in entries] == ["b.0.q", "b.0.k", "b.0.o"]
    assert [entry["shape"] for entry in entries] == [[5, 20], [3, 20], [4, 20]]
    assert warnings == []
    assert seconds == {"observe": 1.0, "solve": 0.5}
    first = results[0]
    pooled = first.moments.hessian + first.moments.heldout
    for entry, rows in zip(entries, (slice(0, 5), slice(5, 8))):
        difference = (first.solution.dequantize() - first.original)[rows]
        for key, moments in (("error", pooled), ("heldout_error", first.moments.heldout)):
            wanted = torch.trace(difference @ moments @ difference.T) / torch.trace(
                first.original[rows] @ moments @ first.original[rows].T
            )
            assert entry[key] == pytest.approx(wanted.item(), rel=1e-4)
        assert entry["clip_rate"] == pytest.approx(first.solution.saturated[rows].mean().item())
        assert entry["massive_tokens"] == {"largest": 9.0, "top_share": 0.3}
        assert entry["bound"] == pytest.approx(3 * entry["expected_error"])
        # From the file alone, without a factorisation: what a box on these lengths leaves to gain.
        part = first.solution.rows(rows.start, rows.stop)
        group = torch.arange(20) // part.grid.group_size
        sides = part.gram_schmidt.double() * part.scales.double().abs()[:, group]
        floor = 20 * (2 * sides.log().mean(1)).exp()
        assert entry["headroom_db"] == pytest.approx(10 * math.log10((sides.square().sum() / floor.sum()).item()))
        assert entry["gap_db"] == pytest.approx(CUBE_DB + entry["headroom_db"])
        assert entry["sphere_bound"] == pytest.approx(entry["expected_error"] / 10 ** (entry["gap_db"] / 10))
        for name, values in (("lengths", part.gram_schmidt.double()), ("steps", sides.square().mean(0).sqrt())):
            levels = 20 * values.log10()
            extremes = [(levels.max() - levels.mean()).item(), (levels.min() - levels.mean()).item()]
            assert entry["profile"][name][:: POINTS - 1] == pytest.approx(extremes, abs=0.051)
    json.dumps(entries, allow_nan=False)


def test_without_held_out_tokens_there_is_no_held_out_error(tmp_path):
    save_stage(tmp_path, solved(STAGES[1], heldout=False), plans())
    (entry,) = site_reports(tmp_path, (Block(0, "b.0", STAGES[1:]),))[0]
    assert entry["heldout_error"] is None
    assert entry["error"] > 0


def test_rounding_has_no_bound_and_kept_columns_say_what_they_save(tmp_path):
    save_stage(tmp_path, solved(STAGES[0], "rtn"), plans(method="rtn"))
    save_stage(tmp_path, result := solved(STAGES[1], "dqc", keep=0.15), plans(method="dqc"))
    rounded, _, kept = site_reports(tmp_path, BLOCKS)[0]
    assert {rounded[key] for key in BABAI_ONLY} == {None}
    assert None not in {kept[key] for key in BABAI_ONLY if key != "profile"}
    assert kept["kept"] == 3
    scores = result.solution.column_scores
    assert kept["kept_columns"] == scores.argsort(descending=True)[:3].tolist()
    assert sorted(kept["kept_columns"]) == result.solution.kept_index.tolist()
    share = (scores.sort(descending=True).values[:3].sum() / scores.sum()).item()
    assert f"would cost {share:.1%} of the site's HOP error" in kept["reason"]


def test_a_metric_without_a_factor_falls_back_to_rounding_and_says_so(tmp_path):
    stage = STAGES[0]
    good = solved(stage)
    spoiled = Problem(good.original, torch.full((COLUMNS, COLUMNS), torch.nan), grid=Grid(4, 8), damping=0.01)
    with pytest.raises(NotPositiveDefinite):
        METHODS["babai"](spoiled)
    solution, warning = _solve("babai", spoiled, stage)
    assert "b.0.q" in warning
    assert "rounded to nearest" in warning
    assert torch.isfinite(solution.dequantize()).all()
    planned = plans(method="dqc", keep=0.15, reason="3 columns stay at 16 bits")
    save_stage(tmp_path, replace(good, solution=solution, warning=warning), planned)
    entries, warnings, _ = site_reports(tmp_path, (Block(0, "b.0", (stage,)),))
    assert warnings == [warning]
    for entry in entries:
        # What was done, not what was planned.
        assert (entry["method"], entry["order"], entry["kept"], entry["kept_columns"]) == ("rtn", "none", 0, [])
        assert (entry["bits"], entry["damping"], entry["bound"]) == (4, 0.0, None)
        # 4 bits and a bfloat16 step for each of three groups in twenty columns.
        assert entry["bits_per_weight"] == pytest.approx(4 + 16 * 3 / 20)
        assert entry["reason"] == f"planned as dqc, but {warning}"
