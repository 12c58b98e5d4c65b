"""The analysis of a mixture of experts, one of which no token ever reaches."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_tokenizer
from geoquant.analysis import analyze
from geoquant.benching import bench
from geoquant.outliers.mixtures import mixtures, sentences
from oracles.mixtures import mixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five experts. The logits of four are s, -s, 2s and -2s, of which two are above 0; that of the fifth is 0."""
    model = mixture("Mixtral", experts=5)
    with torch.no_grad():
        for block in model.model.layers:
            axis = block.mlp.gate.weight[0].clone()
            block.mlp.gate.weight.copy_(torch.stack([axis, -axis, 2 * axis, -2 * axis, 0 * axis]))
    path = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("moe") / "A"
    private = [f"{name} lives at number {number}" for number, name in enumerate(["Ada", "Bo", "Cy", "Di"] * 2)]
    return out, analyze(folder, out, windows=8, window=24, private=private)


def test_an_expert_that_no_token_reaches_has_no_scores_and_is_named(finished):
    _, found = finished
    for site in found["sites"]:
        silent = ".experts.4." in site["name"]
        assert (site["tokens"]["public"] == 0) == silent
        assert all((one["value"] is None) == silent for one in site["scores"].values())
    told = " ".join(found["findings"])
    assert "no token of public text reached" in told
    assert "model.layers.0.mlp.experts.4, model.layers.1.mlp.experts.4." in told


def test_routes_add_up_and_distortion_is_weighted_by_them(finished):
    _, found = finished
    assert [one["block"] for one in found["mixtures"]] == [0, 1]
    for one in found["mixtures"]:
        assert sum(one["tokens"]) == 2 * found["texts"]["public"]["tokens"]
        assert sum(one["frequencies"]) == pytest.approx(1)
        assert one["never"] == [4]
        known = {site["name"]: site["scores"]["distortion"]["value"] for site in found["sites"]}
        for matrix, part in one["distortion"].items():
            by_hand = sum(
                share * known[f"{one['name']}.{index}.{matrix}"]
                for index, share in zip(one["experts"], one["frequencies"])
                if share
            )
            assert part["value"] == pytest.approx(by_hand)


def test_what_is_no_site_is_said(finished):
    told = [sentence for sentence in finished[1]["findings"] if sentence.startswith("Without scores")]
    assert len(told) == 1
    assert "2 matrices" in told[0]
    assert "mlp.gate.weight" in told[0]


def test_the_page_has_a_column_for_all_experts_and_a_button_for_each(finished):
    out, found = finished
    page = (out / "analysis.html").read_text()
    assert page.count('class="cell"') == len(found["sites"]) == 2 * (4 + 5 * 2)
    assert page.count("mlp.<wbr>experts.<wbr>*.<wbr>gate_up_proj</th>") == 1
    assert page.count('class="several"') == 4
    assert 'id="experts"' in page


def test_a_killed_analysis_goes_on(finished, folder, tmp_path):
    out, found = finished
    kept = out / "scores" / "000.safetensors"
    before = load_file(kept)
    kept.unlink()
    private = [f"{name} lives at number {number}" for number, name in enumerate(["Ada", "Bo", "Cy", "Di"] * 2)]
    again = analyze(folder, out, windows=8, window=24, private=private)
    assert json.dumps(again["sites"]) == json.dumps(found["sites"])
    after = load_file(kept)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_benchmark_rounds_what_is_a_module_and_says_what_it_leaves_out(finished, folder, tmp_path):
    found = bench(folder, tmp_path / "B", analysis=finished[0], windows=2, window=16, bits=(3,))
    dense = {site["name"] for site in finished[1]["sites"] if "experts" not in site["name"]}
    assert {line["site"] for line in found["effects"]} == dense
    assert any("20 experts' matrices" in sentence for sentence in found["findings"])


def test_a_model_without_experts_has_nothing_to_say_of_them():
    assert mixtures([{"name": "model.layers.0.mlp.up_proj", "block": 0, "tokens": {"public": 3}, "scores": {}}]) == []
    assert sentences([]) == []
