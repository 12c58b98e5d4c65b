"""The plan: what it decides, what it refuses before anything runs, and that its sizes are those of the files."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import tiny_llama
from geoquant.data.text import builtin_text
from geoquant.errors import UserError
from geoquant.model.load import Loaded
from geoquant.model.walk import walk
from geoquant.pipeline import make_plan
from geoquant.plan import estimate
from geoquant.plan.estimate import cost
from geoquant.plan.uniform import check_choices, kept_count, uniform_plan
from geoquant.recipe import Recipe


@pytest.fixture(scope="module")
def blocks():
    return walk(tiny_llama(), torch.arange(8)[None])


@pytest.fixture
def small(tiny_model_dir, tmp_path, monkeypatch):
    """A recipe that runs in a second."""
    # The machine's speed is no part of what is tested here.
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    text = tmp_path / "text.txt"
    text.write_text(builtin_text()[:4000])
    return Recipe(
        model=str(tiny_model_dir),
        window=32,
        windows=8,
        group_size=16,
        evaluation_windows=2,
        calibration=str(text),
        evaluation=str(text),
        verify=False,
    )


def recipe(**changes) -> Recipe:
    return Recipe(**{"model": "m", "group_size": 16, **changes})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"method": "babay"}, "did you mean 'babai'?"),
        ({"metric": "gradients"}, "did you mean 'gradient'?"),
        ({"order": "actorder"}, "unknown order 'actorder'"),
        ({"method": "rtn", "keep": 0.1}, "method rtn keeps no columns"),
        ({"method": "dqc"}, "add --keep"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(changes, line):
    with pytest.raises(UserError, match=r".") as caught:
        check_choices(recipe(**changes))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_wider_than_a_site_is_refused(blocks):
    with pytest.raises(
        UserError, match=r"group size 33 is larger than the 32 columns of model\.layers\.0\.self_attn\.q"
    ):
        uniform_plan(blocks, recipe(group_size=33))


def test_choices_are_looked_at_before_the_model_is(tmp_path):
    with pytest.raises(UserError, match="did you mean 'babai'"):
        make_plan(Recipe(model=str(tmp_path / "nothing"), method="babay"))


def test_a_group_may_be_as_wide_as_the_narrowest_site(blocks):
    plan = uniform_plan(blocks, recipe(group_size=32))
    # 48 columns hold two groups of 32, the second one short: two scales a row.
    assert plan["model.layers.1.mlp.down_proj"].bits_per_weight == 4 + 16 * 2 / 48
    assert plan["model.layers.0.self_attn.q_proj"].bits_per_weight == 4 + 16 / 32


def test_keeping_columns_means_dqc_whatever_the_method_says(blocks):
    plan = uniform_plan(blocks, recipe(keep=0.05))
    assert {site.method for site in plan.sites} == {"dqc"}
    assert "stay at 16 bits" in plan.sites[0].reason


@pytest.mark.parametrize(
    ("keep", "columns", "count"), [(0, 32, 0), (1e-6, 32, 1), (0.05, 40, 2), (0.5, 2, 1), (0.5, 32, 16), (0.26, 4, 2)]
)
def test_kept_columns_are_counted_like_people_would(keep, columns, count):
    assert kept_count(keep, columns) == count


def test_kept_columns_are_counted_like_the_solver_counts_them(blocks):
    from geoquant.methods.dqc import kept_columns

    for columns in (2, 3, 32, 48, 100, 577):
        for keep in (1e-3, 0.01, 0.05, 0.1, 1 / 3, 0.5):
            assert kept_count(keep, columns) == len(kept_columns(torch.rand(columns), keep)), (keep, columns)


def test_bits_per_weight_are_averaged_over_weights_not_sites(blocks):
    plan = uniform_plan(blocks, recipe(group_size=32, keep=0.05))
    weights = sum(math.prod(site.shape) for site in plan.sites)
    bits = 0.0
    for site in plan.sites:
        rows, columns = site.shape
        kept, groups = kept_count(0.05, columns), -(-columns // 32)
        bits += rows * (columns - kept) * 4 + rows * kept * 16 + rows * groups * 16 + kept * 16
    assert plan.bits_per_weight == pytest.approx(bits / weights, rel=1e-12)


def test_sites_come_in_model_order_with_one_scheme_per_stage(blocks):
    plan = uniform_plan(blocks, recipe())
    assert [site.name for site in plan.sites] == [site.name for block in blocks for site in block.sites]
    for block in blocks:
        for stage in block.stages:
            method, options = plan.settings(stage, static_scales=True)
            assert method == "babai"
            assert options["static_scales"] is True
            assert {plan[site.name].grid for site in stage.sites} == {options["grid"]}


def test_a_plan_writes_nothing_and_runs_nothing(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    planned = make_plan(small)
    assert sorted(tmp_path.rglob("*")) == before
    assert [site["name"] for site in planned["sites"]][:4] == [
        f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"
    ]
    assert planned["estimate"]["seconds"] > 0
    assert planned["model"]["architecture"] == "LlamaForCausalLM"


def test_the_estimate_grows_with_the_work(small, blocks, monkeypatch):
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    loaded = Loaded(tiny_llama(), None, "tiny", "tiny", torch.float32, "")

    def seconds(windows: int = 8, **changes) -> float:
        return cost(loaded, blocks, (windows, 64), small.model_copy(update=changes)).seconds

    assert seconds(windows=16) > seconds()
    assert seconds(metric="gradient") > seconds(metric="plain")
    assert seconds(sequential="off") > seconds(sequential="site", target="weights")
    assert seconds(target="outputs") > seconds(target="weights")
    assert seconds(target="outputs", sequential="off") == seconds(target="weights", sequential="off")
    memory = cost(loaded, blocks, (8, 64), small).memory_bytes
    assert memory > sum(parameter.nbytes for parameter in loaded.model.parameters())
