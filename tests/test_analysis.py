"""The analysis of a model from end to end, on a tiny one."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape

import pytest
import torch
from safetensors import safe_open

from conftest import make_tokenizer, tiny_llama
from geoquant.analysis import PARTS, analyze
from geoquant.data.private import make_records
from geoquant.errors import UserError
from geoquant.outliers.appraise import DRAWS
from geoquant.outliers.score_findings import headlines, score_findings


@pytest.fixture(scope="module")
def sides():
    """Records of both sides."""
    made = make_records(24, 5)
    return made[:12], made[12:]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """The tiny Llama with every weight a little elsewhere: what the model was fine-tuned from."""
    model, folder = tiny_llama(), tmp_path_factory.mktemp("base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, base_dir, sides):
    """A whole analysis and its folder."""
    out = tmp_path_factory.mktemp("analysis") / "A"
    found = analyze(
        tiny_model_dir, out, base=base_dir, private=sides[0], domain=sides[1], windows=8, window=24, records=8
    )
    return out, found


def test_every_site_has_every_score_with_error_and_null(finished):
    _, found = finished
    assert len(found["sites"]) == 14
    names = {score["name"] for score in found["scores"]}
    for site in found["sites"]:
        assert set(site["scores"]) == names
        for one in site["scores"].values():
            assert None not in (one["value"], one["se"], one["null"])
    assert len(found["findings"]) == len(names)


def test_origins_are_part_of_it_and_not_measured_twice(finished):
    out, found = finished
    assert found["origins"] == json.loads((out / "origins.json").read_text())
    assert len(found["origins"]["findings"]) >= 6


def test_the_files_hold_what_was_returned(finished):
    out, found = finished
    told = json.loads((out / "analysis.json").read_text())
    assert told["sites"] == found["sites"]
    with safe_open(out / "scores" / "000.safetensors", "pt") as file:
        site = found["sites"][0]
        values = file.get_tensor(f"{site['name']}|dsm|columns")
        assert values.shape == (site["shape"][1],)
        assert values.sum().item() == pytest.approx(site["scores"]["dsm"]["value"], rel=1e-4)
        scale = file.get_tensor(f"{site['name']}|dsm|groups_scale")
        groups = file.get_tensor(f"{site['name']}|dsm|groups").float() * scale
        assert groups.sum().item() == pytest.approx(site["scores"]["dsm"]["value"], rel=1e-2)


def test_a_killed_analysis_goes_on_with_the_blocks_it_lacks(finished, tmp_path, tiny_model_dir, base_dir, sides):
    out, found = finished
    shutil.copytree(out, tmp_path / "A")
    (tmp_path / "A" / "scores" / "000.safetensors").unlink()
    (tmp_path / "A" / "analysis.json").unlink()
    kept = (tmp_path / "A" / "scores" / "001.safetensors").stat().st_mtime_ns
    settings = {"base": base_dir, "private": sides[0], "domain": sides[1], "windows": 8, "window": 24, "records": 8}
    again = analyze(tiny_model_dir, tmp_path / "A", **settings)
    assert again["sites"] == found["sites"]
    assert (tmp_path / "A" / "scores" / "001.safetensors").stat().st_mtime_ns == kept


def test_damaged_parts_are_made_again(finished, tmp_path, tiny_model_dir, base_dir, sides):
    out, found = finished
    shutil.copytree(out, tmp_path / "A")
    (tmp_path / "A" / "scores" / "000.safetensors").write_bytes(b"12")
    (tmp_path / "A" / "origins.json").write_text('{"findings": [')
    (tmp_path / "A" / "analysis.json").write_text("{")
    settings = {"base": base_dir, "private": sides[0], "domain": sides[1], "windows": 8, "window": 24, "records": 8}
    again = analyze(tiny_model_dir, tmp_path / "A", **settings)
    assert again["sites"] == found["sites"]
    assert again["origins"] == found["origins"]


def test_a_model_of_zeros_is_analysed(tmp_path):
    """Every ratio in it is one of nothing and nothing: the files hold null, not NaN."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "zeros")
    make_tokenizer().save_pretrained(tmp_path / "zeros")
    analyze(tmp_path / "zeros", tmp_path / "A", windows=4, window=16)
    for name in ("origins.json", "analysis.json"):
        json.loads((tmp_path / "A" / name).read_text(), parse_constant=pytest.fail)


def test_another_analysis_does_not_go_on_in_the_folder(finished, tiny_model_dir):
    with pytest.raises(UserError, match="of another model"):
        analyze(tiny_model_dir, finished[0], windows=8, window=24)


def test_a_foreign_folder_is_left_alone(tmp_path, tiny_model_dir):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"precious\.txt"):
        analyze(tiny_model_dir, tmp_path, windows=8, window=24)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["precious.txt"]


def test_without_private_text_and_base_the_scores_that_need_them_are_left_out(tmp_path, tiny_model_dir):
    found = analyze(tiny_model_dir, tmp_path / "A", windows=8, window=24)
    assert found["scores"]
    assert all(set(score["needs"]) <= {"public_gradients", "public_metrics"} for score in found["scores"])


def test_classes_are_there_where_they_are_asked_for(tmp_path, tiny_model_dir, finished):
    assert all("classes" not in site for site in finished[1]["sites"])
    found = analyze(tiny_model_dir, tmp_path / "A", windows=8, window=24, classes=True)
    for site in found["sites"]:
        assert sum(site["classes"]["columns"]["counts"].values()) == site["shape"][1]
        assert (site["classes"]["distortion"] is None) == (site["shape"][0] <= 32)
    assert "Classes of columns at 14 sites" in found["findings"][-2]
    assert "Distortion of rows" in found["findings"][-1]
    assert found["findings"][-1] in (tmp_path / "A" / "analysis.html").read_text()
    with pytest.raises(UserError, match="of another model"):
        analyze(tiny_model_dir, tmp_path / "A", windows=8, window=24)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"domain": ["one text", "and two"] * 9}, "--private"),
        ({"private": ["one text", "and two"] * 9, "domain": ["one text", "others"] * 9}, "9 of 18 non-member records"),
        ({"windows": 3}, "--windows 3; wanted at least 4"),
        ({"windows": -4}, "--windows -4"),
        ({"private": ["one text"] * 9, "records": 0}, "--records 0; wanted at least 4"),
        ({"private": ["one text"] * 9, "records": -1}, "--records -1"),
        ({"private": ["a"] * 9}, "too few private records: 0 of two tokens"),
        ({"bits": 9}, "--bits 9; wanted a whole number from 2 to 8"),
        ({"window": 4}, "--window 4; wanted at least 8"),
        ({"window": 4096}, "context"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(tmp_path, tiny_model_dir, wrong, message):
    with pytest.raises(UserError, match=message):
        analyze(tiny_model_dir, tmp_path / "A", **{"windows": 8, "window": 24} | wrong)
    assert not (tmp_path / "A").exists()


def test_a_base_of_another_shape_is_named(tmp_path, tiny_model_dir):
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="has not the layers"):
        analyze(tiny_model_dir, tmp_path / "A", base=tmp_path / "base", windows=8, window=24)


def test_a_model_is_no_base_of_itself(tmp_path, tiny_model_dir):
    with pytest.raises(UserError, match="itself; give the model that it was fine-tuned from"):
        analyze(tiny_model_dir, tmp_path / "A", base=tiny_model_dir, windows=8, window=24)
    assert not (tmp_path / "A").exists()


def test_only_the_sequences_that_were_used_are_counted(tmp_path, tiny_model_dir, sides):
    found = analyze(tiny_model_dir, tmp_path / "A", private=sides[0], windows=5, window=24, records=7)
    assert found["texts"]["public"]["windows"] == 4
    assert found["texts"]["public"]["tokens"] == 4 * 24
    assert found["texts"]["private"]["records"] == 4


def told(*sites: tuple[float | None, ...], **score: str) -> str:
    """The sentence on sites of these values, standard errors, nulls and standard deviations of the null."""
    names = ("value", "se", "null", "null_sd")
    rows = [
        {"name": f"s{n}", "shape": [64, 8], "scores": {"x": dict(zip(names, one)) | {"beyond": 2}}}
        for n, one in enumerate(sites)
    ]
    given = {"name": "x", "title": "this", "same": "", "error_over": "texts"} | score
    return score_findings(rows, [given], PARTS, DRAWS)[0]


def test_a_finding_counts_sites_that_four_parts_and_four_draws_make_sure_of():
    assert (
        told((1.0, 0.2, 0.5, 0.0), (1.0, 0.1, 0.5, 0.0), (0.1, 0.1, 0.5, 0.0))
        == "This: largest at s0 (1, null 0.5); 1 of 3 sites above their null, 1 below."
    )
    assert "; 0 of 1 sites above" in told((1.0, 0.1, 0.5, 0.2))
    assert "; 1 of 1 sites above" in told((1.0, 0.01, 0.5, 0.01), error_over="rows")


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0])
def test_a_site_with_nothing_to_find_is_beyond_its_null_at_the_stated_rate(spread):
    """Of 4,000 sites one in forty is above and one below, give or take four standard errors (1%), however the error of
    the value and that of the null share the uncertainty; Welch's degrees of freedom are known to err towards fewer.
    """
    chance = torch.Generator().manual_seed(0)
    parts = torch.randn(4000, PARTS, generator=chance)
    placed, *nulls = spread * torch.randn(DRAWS + 1, 4000, generator=chance)
    nulls = torch.stack(nulls)
    columns = (parts.mean(1) + placed, parts.std(1) / PARTS**0.5, nulls.mean(0), nulls.std(0))
    sentence = told(*zip(*(column.tolist() for column in columns)))
    above = int(sentence.split("; ")[1].split(" of ")[0])
    below = int(sentence.split(", ")[-1].split(" ")[0])
    for count in (above, below):
        assert 0.012 * 4000 < count < 0.035 * 4000


def test_a_null_that_cannot_tell_is_not_counted_against():
    """Two of eight columns are beyond."""
    same = told((23.1, 0.1, 23.1001, 0.0), (2.0, 0.1, 2.0, 0.0), same="why")
    assert same.endswith("the null is the same by construction; 25.0% of columns beyond 99% of their null's.")
    assert "without a null" in told((2.0, None, None, None), (1.0, 0.1, None, None))
    assert "1 of 2 sites above" in told((2.0, None, None, None), (1.0, 0.1, 0.1, 0.0))


def test_findings_stand_under_what_they_are_about_the_surest_first():
    """Three scores of rounding, one of private text, one of weights: the first two of a headline are shown."""
    rows = [
        {
            "name": f"s{n}",
            "shape": [64, 8],
            "scores": {
                name: {"value": float(n < above), "se": 0.01, "null": 0.0, "null_sd": 0.01, "beyond": 0}
                for name, above in {"none": 0, "most": 9, "some": 4, "secret": 1, "tail": 2}.items()
            },
        }
        for n in range(10)
    ]
    common = {"unit": "nats per token", "same": "", "error_over": "texts", "needs": []}
    scores = [common | {"name": name, "title": name} for name in ("none", "most", "some")]
    scores += [common | {"name": "secret", "title": "secret", "needs": ["private"]}]
    scores += [common | {"name": "tail", "title": "tail", "unit": "", "error_over": "rows"}]
    told = {one["title"]: one for one in headlines(rows, scores, PARTS, DRAWS)}
    assert list(told) == ["Private and unseen records", "What rounding costs", "Weights by themselves"]
    costs = told["What rounding costs"]
    assert [sentence.split(":")[0] for sentence in costs["first"] + costs["rest"]] == ["Most", "Some", "None"]
    assert len(costs["rest"]) == 1
    whole = [sentence for one in told.values() for sentence in one["first"] + one["rest"]]
    assert sorted(whole) == sorted(score_findings(rows, scores, PARTS, DRAWS))


def test_every_score_says_what_its_error_and_its_null_are_made_of(finished):
    """Rows for weights alone, which are never without an error; nulls that are drawn have a spread."""
    found = finished[1]
    told = {score["name"]: score for score in found["scores"]}
    assert {name for name, score in told.items() if score["error_over"] == "rows"} == {
        *("change", "change_squared", "distortion", "kurtosis", "kurtosis_row", "kurtosis_column")
    }
    assert {name for name, score in told.items() if score["same"]} == {"change", "change_squared"}
    assert found["nulls"] == {"draws": DRAWS, "beyond": 0.01}
    for name, score in told.items():
        read = [site["scores"][name] for site in found["sites"]]
        assert any(one["se"] for one in read), name
        known = score["same"] or name == "kurtosis_input"  # by formula: of normal inputs it is zero
        assert any(one["null_sd"] for one in read) != bool(known), name
        assert (read[0]["beyond"] is None) == (score["axis"] == "site")


def test_the_page_holds_the_numbers_and_runs_nothing_else(finished):
    out, found = finished
    page = (out / "analysis.html").read_text()
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert data["sites"] == found["sites"]
    assert page.count('class="cell"') == len(found["sites"])
    assert page.count(" selected>") == 1
    assert '<option value="privacy_memory" selected>' in page
    assert "no sign of safety" in page
    assert 'type="checkbox" id="over"' in page
    listed = [unescape(one) for one in re.findall(r"<li>(.*?)</li>", page)]
    assert [sentence for sentence in found["findings"] if listed.count(sentence) != 1] == []
    assert 'class="panel"' not in page  # which would be as wide as the page, however little it holds
    assert "Attention on the sink by block and head" in page
    heads = sum(len(row) for row in found["origins"]["sinks"]["mass"])
    assert page.count("<title>block ") == heads
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
