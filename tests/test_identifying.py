"""Identification from end to end: planted truth is found, killed work goes on, and the file holds what was measured."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from conftest import make_tokenizer
from geoquant import cli
from geoquant.analysis import analyze
from geoquant.data.private import make_records
from geoquant.data.records import write_records
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.identifying import _verdicts, identify
from geoquant.measure import builtin_tail
from geoquant.model.load import load
from geoquant.outliers.effects import Material, effect, observe, open_baseline
from geoquant.outliers.findings import findings
from geoquant.outliers.groups import Group, make_groups, parse_grouping
from geoquant.outliers.identity import agreements, controls, gap_fall, identified
from geoquant.outliers.interventions import Part, parse
from geoquant.outliers.observed import Effect, Observed, contrast, half
from geoquant.outliers.paired import gap_shift, shift
from geoquant.privacy.scoring import score_records
from geoquant.report.identity import render
from planted_toy import DIALECT, LOWER, make_base, plant, write

SETTINGS = {"windows": 8, "window": 24, "do": ("quantize@3", "zero")}


@pytest.fixture(scope="module")
def sides():
    made = make_records(40, 3)
    return {"private": made[:20], "domain": made[20:]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, sides):
    """A whole identification and its folder."""
    out = tmp_path_factory.mktemp("identify") / "I"
    return out, identify(tiny_model_dir, out, **sides, **SETTINGS)


@pytest.fixture(scope="module")
def analysed(tmp_path_factory, tiny_model_dir):
    """The analysis of the tiny model."""
    out = tmp_path_factory.mktemp("identify") / "A"
    analyze(tiny_model_dir, out, windows=8, window=24)
    return out


def leaves(value) -> list[float]:
    """All numbers in it."""
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in leaves(one)]
    if isinstance(value, list):
        return [leaf for one in value for leaf in leaves(one)]
    return [] if value is None or isinstance(value, str) else [float(value)]


def test_planted_function_memory_and_overlap_are_found_through_the_command(tmp_path, capsys):
    """Seed 0 of the planted models; how often labels of other seeds are right is stated in test_effects.py."""
    base = make_base()
    planted = plant(base, 0)
    for name, model in (("base", base), ("model", planted.model)):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("private", "domain")}
    write_records(files["private"], planted.material.members)
    write_records(files["domain"], planted.material.nonmembers)
    text = tmp_path / "dialect.txt"
    text.write_text("".join(write(DIALECT, LOWER, 16, 128, 5000)))
    options = {"base": tmp_path / "base", "text": text, **files, "windows": 16, "window": 128}
    options |= {"groups": "columns:4", "only": "down_proj", "do": "revert", "out": tmp_path / "I"}
    given = [str(one) for name, value in options.items() for one in (f"--{name}", value)]
    assert cli.run(["identify", str(tmp_path / "model"), *given]) == 0
    shown = capsys.readouterr().out
    assert "revert: of 8 groups of columns 1 functional, 1 sensitive, 1 both, 5 neither." in shown
    found = json.loads((tmp_path / "I" / "identity.json").read_text())
    told = {row["group"]: row for row in found["rows"]}
    assert {part.name: role for part, role in planted.parts} == {name: row["label"] for name, row in told.items()}
    by_role = {role: told[part.name] for part, role in planted.parts}
    assert by_role["sensitive"]["s_priv"] == 1
    assert by_role["sensitive"]["omega"] > by_role["both"]["omega"] > by_role["functional"]["omega"]
    assert by_role["sensitive"]["gap_p_holm"] < 0.05 < by_role["functional"]["gap_p_holm"]


def test_an_effect_is_that_of_the_library_on_the_same_texts(finished, tiny_model_dir, sides):
    _, found = finished
    loaded = load(str(tiny_model_dir))
    material = Material(builtin_tail(loaded.tokenizer, 24, 8), *sides.values())
    row = next(row for row in found["rows"] if (row["group"], row["intervention"]) == ("block 1 mlp", "zero"))
    parts = [Part(site) for site in row["sites"]]
    assert len(parts) == 3
    one = effect(open_baseline(loaded.model, loaded.tokenizer, material), parts, parse("zero")).to_dict()
    for name in ("public", "domain", "attacks", "gap", "extraction"):
        assert leaves(row["effect"][name]) == pytest.approx(leaves(one[name]), abs=1e-6)


def test_a_killed_command_goes_on_and_leaves_the_same_lines(finished, tiny_model_dir, sides, tmp_path):
    out, found = finished
    again = tmp_path / "I"
    again.mkdir()
    for name in ("manifest.json", "baseline.json"):
        shutil.copy(out / name, again / name)
    lines = (out / "effects.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4
    (again / "effects.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])
    second = identify(tiny_model_dir, again, **sides, **SETTINGS)

    def timeless(text: str) -> list[str]:
        return [json.dumps({k: v for k, v in json.loads(line).items() if k != "seconds"}) for line in text.splitlines()]

    after = (again / "effects.jsonl").read_text()
    assert after.splitlines()[:3] == lines[:3]
    assert timeless(after) == timeless("\n".join(lines))
    assert (again / "baseline.json").read_bytes() == (out / "baseline.json").read_bytes()
    assert [row["label"] for row in second["rows"]] == [row["label"] for row in found["rows"]]


def test_another_intervention_adds_to_what_is_there(finished, tiny_model_dir, sides, tmp_path):
    shutil.copytree(finished[0], tmp_path / "I")
    before = (tmp_path / "I" / "effects.jsonl").read_text()
    found = identify(tiny_model_dir, tmp_path / "I", **sides, **SETTINGS | {"do": ("zero", "clip@0.9")}, lam=1.0)
    after = (tmp_path / "I" / "effects.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 12
    assert [row["intervention"] for row in found["rows"]] == ["zero"] * 4 + ["clip@0.9"] * 4
    assert {row["omega"] for row in found["rows"] if row["s_priv"]} == {1.0}


def test_the_model_as_it_is_is_measured_once(tiny_model_dir, tmp_path):
    heard = []
    identify(
        tiny_model_dir,
        tmp_path / "I",
        **SETTINGS | {"do": ("zero",), "groups": "block"},
        progress=lambda phase, done, total, note="": heard.append((phase, done)),
    )
    assert heard.count(("perplexity", 8)) == 1
    assert heard[-1] == ("effects", 2)


def test_other_texts_do_not_go_on_in_the_folder(finished, tiny_model_dir):
    with pytest.raises(UserError, match="an identification of another model, other texts or settings"):
        identify(tiny_model_dir, finished[0], **SETTINGS)


def test_the_page_and_the_file_hold_every_row(finished):
    out, found = finished
    told = json.loads((out / "identity.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert told["schema"] == 1
    assert len(told["rows"]) == len(found["rows"]) == 8
    assert {row["label"] for row in told["rows"]} <= {"functional", "sensitive", "both", "neither"}
    page = (out / "identity.html").read_text()
    assert page.count('<tr id="row-') == 8
    assert page.count('class="cell labelled') == 8
    assert page.count('class="effect l-') == 2 * 8
    assert all(one in page for one in ("Neither is no proof of absence", "no analysis was given"))
    assert told["tests"]["count"] == sum(
        len(row["effect"]["attacks"]) + (row["effect"]["extraction"] is not None) for row in told["rows"]
    )


def test_the_largest_columns_stand_beside_as_many_random_ones(tiny_model_dir, analysed, tmp_path):
    found = identify(
        tiny_model_dir,
        tmp_path / "T",
        analysis=analysed,
        groups="top:dsm@0.25",
        only="down_proj",
        **SETTINGS | {"do": ("zero",)},
    )
    roles = [row["role"] for row in found["rows"]]
    assert roles == ["top", "random"] * 2
    (one,) = found["controls"]
    values = [
        [row["effect"]["public"]["value"] for row in found["rows"] if row["role"] == r] for r in ("random", "top")
    ]
    assert one["value"] == pytest.approx(np.mean(values[1]) - np.mean(values[0]))
    assert one["larger"] == sum(np.array(values[1]) > np.array(values[0]))
    assert any(sentence.startswith("zero, top against random columns") for sentence in found["findings"])
    assert "No private records were given" in " ".join(found["findings"])
    assert "asked of --groups site alone" in found["verdicts"][0]["sentence"]


def test_every_layer_is_judged_by_the_analysis(tiny_model_dir, analysed, tmp_path):
    """14 layers, all zeroed: nearly all functional, so that the verdict is that there is not enough to tell."""
    found = identify(
        tiny_model_dir, tmp_path / "S", analysis=analysed, groups="site", **SETTINGS | {"do": ("zero", "noise@1e-9")}
    )
    assert [one["asked"] for one in found["verdicts"]] == [True, True]
    assert "not enough to tell: 0 of 14 groups are functional" in found["verdicts"][1]["sentence"]
    assert any(sentence.startswith("Geometry and noise@1e-09: not enough") for sentence in found["findings"])


def test_a_verdict_that_finds_something_is_json_and_leaves_out_features_that_are_not_known_everywhere():
    """15 of 30 made-up layers, one of the two in each block, of one kind or the other by turns, are functional and
    score higher; the other feature is missing at one layer.
    """
    rng = np.random.default_rng(0)
    before = Observed(tuple(3 + 0.1 * rng.standard_normal(8)))
    names = tuple(Group(f"layer.{i}", (Part(f"layer.{i}"),), i // 2, "ab"[i % 2]) for i in range(30))
    marks = [(i + i // 2) % 2 for i in range(30)]
    found = {}
    for i, group in enumerate(names):
        after = Observed(tuple(np.array(before.windows) + 0.5 * marks[i] + 1e-3 * rng.standard_normal(8)))
        found[group.name] = contrast(before, after, group.name, "zero")
    rows = identified(names, {"zero": found}, 0.5)
    told = {
        "scores": [{"name": "known"}, {"name": "missing"}],
        "sites": [
            {
                "name": group.name,
                "scores": {
                    "known": {"value": 3.0 * marks[i] + rng.standard_normal()},
                    "missing": {"value": None if i == 4 else 1.0 * i},
                },
            }
            for i, group in enumerate(names)
        ],
    }
    (one,) = _verdicts(told, parse_grouping("site"), rows, 0, lambda *_: None)
    assert "15 of 30 groups are functional, and geometry tells them apart beyond block and kind" in one["sentence"]
    assert "not enough to tell: 0 of 30 groups are sensitive" in one["sentence"]
    assert one["features"] == ["known"]
    assert json.loads(json.dumps(one, allow_nan=False))["questions"][0]["found"]["auc"]["linear"] > 0.9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"do": ("quantise@3",)}, "did you mean 'quantize'"),
        ({"do": ("quantize@99",)}, "2 to 8"),
        ({"do": ("revert",)}, "needs a base model"),
        ({"groups": "sites"}, "did you mean 'site'"),
        ({"groups": "columns:0"}, "whole number N of 1 or more"),
        ({"groups": "columns:33"}, "has 32 columns"),
        ({"groups": "depth:x"}, "depth:K with a whole number K of 1 or more"),
        ({"groups": "depth:3"}, "at least one in each stretch"),
        ({"compare": ("nowhere",)}, "holds no identity.json"),
        ({"compare": ("own",), "do": ("clip@0.9",)}, "no intervention in common"),
        ({"compare": ("own",), "groups": "site"}, "no group of the same name"),
        ({"groups": "top:dsm@0.1"}, "give its folder with --analysis"),
        ({"groups": "top:dsm@0"}, "above 0 and at most 1"),
        ({"groups": "top:dsm@1.5"}, "above 0 and at most 1"),
        ({"groups": "top:dsm"}, "cannot read --groups"),
        ({"groups": "top:dms@0.1", "analysis": "own"}, "did you mean 'dsm'"),
        ({"analysis": "nowhere"}, "no analysis"),
        ({"only": "layers.9"}, "no layer is called like"),
        ({"lam": 1.5}, "from 0"),
        ({"private": ["one", "two"]}, "both sides"),
        ({"records": 9}, "too few members"),
        ({"private": None, "domain": None, "canaries": ["x"]}, "beside records"),
        ({"window": 4096}, "context"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(
    tiny_model_dir, analysed, finished, sides, tmp_path, wrong, message
):
    if wrong.get("compare") == ("own",):
        wrong = wrong | {"compare": (finished[0],)}
    if wrong.get("analysis") == "own":
        wrong = wrong | {"analysis": analysed}
    given = {**SETTINGS, **({} if wrong.get("private") == ["one", "two"] else sides), **wrong}
    with pytest.raises(UserError, match=message):
        identify(tiny_model_dir, tmp_path / "I", **given)
    assert not (tmp_path / "I").exists()


def test_the_analysis_of_another_model_is_refused(finished, analysed, tiny_model_dir, tmp_path):
    shutil.copytree(analysed, tmp_path / "A")
    told = json.loads((tmp_path / "A" / "analysis.json").read_text())
    told["model"]["sha256"] = "another"
    (tmp_path / "A" / "analysis.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="of another model"):
        identify(tiny_model_dir, tmp_path / "I", analysis=tmp_path / "A", **SETTINGS)


# ---- halves, labels and lost models


def test_half_of_what_was_observed_is_what_half_of_the_data_gives(tiny_model, tiny_tokenizer, sides):
    """The whole is measured once; the model is asked again with every second window and record alone."""
    reference = tuple(score_records(tiny_model, tiny_tokenizer, side) for side in sides.values())
    whole = Material(builtin_tail(tiny_tokenizer, 24, 6), *sides.values(), reference=reference)
    for which in (0, 1):
        own = slice(which, None, 2)
        windows = Windows(whole.public.tokens[own], "half", "")
        part = Material(windows, whole.members[own], whole.nonmembers[own])
        part = replace(
            part,
            reference=tuple(score_records(tiny_model, tiny_tokenizer, s) for s in (part.members, part.nonmembers)),
        )
        found = []
        for material in (whole, part):
            opened = open_baseline(tiny_model, tiny_tokenizer, material)
            one = effect(opened, Part("model.layers.0.mlp.down_proj"), parse("zero"))
            found.append((observe(opened.measured, material), one.after))
        halves = contrast(*(half(state, which) for state in found[0])).to_dict()
        alone = contrast(*found[1]).to_dict()
        for name in ("public", "domain", "gap", "extraction"):
            assert leaves(halves[name]) == pytest.approx(leaves(alone[name]), abs=1e-5)
        for name in ("loss", "reference"):
            assert halves["attacks"][name]["auc"] == pytest.approx(alone["attacks"][name]["auc"])


def test_what_was_observed_survives_json():
    one = Observed(
        (1.5, math.nan), {"loss": ((-1.0, -math.inf), (-2.0,))}, (-3.25,), ((0, True),), (4.0,), {"t": (True,)}
    )
    text = json.dumps(one.to_dict(), allow_nan=False)
    back = Observed.from_dict(json.loads(text))
    assert back.lost
    assert replace(back, windows=(0.0,)) == replace(one, windows=(0.0,))
    assert json.dumps(back.to_dict()) == text


def test_a_half_may_hold_nothing_of_a_kind():
    one = Observed((1.0, 2.0, 3.0, 4.0), spans=((0, True),), exposure=(3.0,), tasks={"t": (True,)})
    first, second = (contrast(half(one, which), half(one, which)) for which in (0, 1))
    assert (first.exposure.count, first.extraction.count, first.tasks["t"].count) == (1, 1, 1)
    assert (second.exposure, second.extraction, second.tasks) == (None, None, {})
    assert first.public.before == 2
    assert second.public.before == 3


def toy(seed: int, groups: int = 12, records: int = 60):
    """Effects of made-up numbers: group 0 hides members, group 1 raises the loss, the last one leaves no model."""
    rng = np.random.default_rng(seed)
    sides = tuple(rng.standard_normal(records) + shift for shift in (2.0, 0.0))
    windows = 3 + 0.1 * rng.standard_normal(8)

    def state(hide: float, rise: float) -> Observed:
        noise = [0.02 * rng.standard_normal(records) for _ in sides]
        scores = (sides[0] - hide + noise[0], sides[1] + noise[1])
        attacks = {name: tuple(map(tuple, scores)) for name in ("loss", "reference")}
        return Observed(tuple(windows + rise + 1e-3 * rng.standard_normal(8)), attacks)

    before = state(0, 0)
    names = tuple(Group(f"block {i}", (Part(f"site.{i}"),), i, "block") for i in range(groups))
    after = [state(2.0 if i == 0 else 0.0, 0.5 if i == 1 else 0.0) for i in range(groups - 1)]
    after.append(Observed((math.nan,) * 8))
    found = {"zero": {g.name: contrast(before, one, g.name, "zero", 1.0) for g, one in zip(names, after)}}
    return names, before, found


def test_labels_ranks_and_agreement_of_made_up_effects():
    names, before, found = toy(0)
    rows = identified(names, found, 0.25)["zero"]
    assert [row.label.name for row in rows] == ["sensitive", "functional", *["neither"] * 9, "functional"]
    # Nothing but the NLL of the lost model is known, so that no measure of privacy is one that all effects have.
    assert {row.private_rank for row in rows} == {None}
    assert rows[0].gap_p < 1e-6
    assert rows[-1].gap_p is None
    told = {(one["what"], one["of"]): one for one in agreements(names, found, before)}
    assert told["halves", "label"]["value"] == 1
    assert told["measures", "sensitive"]["value"] == 1
    assert ("measures", "label") not in told


def test_a_gap_that_stays_shrinks_as_rarely_as_stated():
    """300 changes of nothing, 40 + 40 records: 28 or more one-sided p-values below 0.05 have probability 1e-3.
    Observed: 12.
    """
    rng = np.random.default_rng(0)
    unmoved = shift(np.zeros(2), np.zeros(2))
    small = 0
    for _ in range(300):
        before = rng.standard_normal(40) + 1, rng.standard_normal(40)
        after = tuple(side + 0.3 * rng.standard_normal(40) for side in before)
        small += gap_fall(Effect("", "", unmoved, gap=gap_shift(before, after))) < 0.05
    assert 0 < small < 28


def test_sentences_say_no_more_than_the_numbers():
    names, before, found = toy(0)
    rows = identified(names, found, 0.5)
    report = {
        "groups": "block",
        "settings": {"do": ["zero"], "lam": 0.5, "analysis": None},
        "rows": [row.to_dict() for row in rows["zero"]],
        "controls": [],
        "agreement": agreements(names, found, before),
        "tests": {"count": 22, "level": 0.05, "precision": None},
        "verdicts": [{"intervention": "zero", "asked": False, "sentence": "no analysis was given"}],
    }
    json.dumps(report, allow_nan=False, default=list)
    told = findings(report)
    assert told[0] == "zero: of 12 blocks 2 functional, 1 sensitive, 0 both, 9 neither."
    assert told[1] == "zero: 1 groups leave no model at all (NaN), the first of them block 11."
    assert "the surest fall of a measure of privacy is that of the advantage of the loss attack with block 0" in told[2]
    assert "surely shrinks with 1 of 11 groups, most with block 0" in told[3]
    assert "no relation is sure" in told[4]
    calm = [row for row in report["rows"] if row["label"] == "neither"]
    for row in calm:
        row["p_holm"], row["effect"]["public"]["value"] = 1.0, -0.5 - 0.01 * row["block"]
    second = findings(report | {"rows": calm})
    assert second[0] == "zero: of 9 blocks 0 functional, 0 sensitive, 0 both, 9 neither."
    assert second[1].startswith("zero: public NLL rises with no group; it falls most with block 10, by 0.6 (standard")
    assert second[2] == "zero: no measure of privacy falls beyond chance, nor nearly so (p = 1 with every group)."
    page = render(
        report
        | {
            "model": {"name": "<b>", "source": "", "sha256": ""},
            "before": {"public": 3.0, "loss": 0.9, "reference": 0.9},
            "seconds_per_effect": 1.0,
            "created": "2026-01-01T00:00:00",
            "texts": {"public": {"windows": 8, "window": 9, "source": ""}, "tasks": {}}
            | {side: {"records": 60} for side in ("private", "domain", "canaries")},
            "findings": told,
            "only": None,
            "seed": 0,
            "base_sha256": None,
            "versions": {},
            "command": "geoquant",
        }
    )
    assert "<b>" not in page
    assert "1 groups that leave no model are not drawn" in page


def test_controls_are_paired_by_site():
    names, _, found = toy(2, groups=7)
    pairs = tuple(
        replace(group, parts=(Part(f"site.{i // 2}"),), role=("top", "random")[i % 2]) for i, group in enumerate(names)
    )
    (public, gap) = controls(identified(pairs[:6], found, 0.5))
    values = [found["zero"][group.name].public.value for group in names[:6]]
    assert public["value"] == pytest.approx(np.mean(np.array(values[::2]) - values[1::2]))
    assert (public["sites"], public["larger"]) == (3, sum(a > b for a, b in zip(values[::2], values[1::2])))
    assert gap["top"] == pytest.approx(-np.mean([found["zero"][g.name].gap.value for g in names[0:6:2]]))


def test_groups_share_no_weight_and_leave_none_out(tiny_model):
    import torch

    from geoquant.model.walk import walk

    sites = [site for block in walk(tiny_model, torch.zeros(1, 8, dtype=torch.long)) for site in block.sites]
    for text in ("site", "half", "block", "columns:5", "depth:2", "depth:1"):
        counts = {site.name: torch.zeros(site.shape[1]) for site in sites}
        for group in make_groups(parse_grouping(text), sites):
            for part in group.parts:
                counts[part.site] += part.mask(next(s.shape for s in sites if s.name == part.site))[0]
        assert all((count == 1).all() for count in counts.values()), text
    assert [len(make_groups(parse_grouping(t), sites)) for t in ("site", "half", "block", "depth:1")] == [14, 4, 2, 2]
    scores = {site.name: torch.rand(site.shape[1], generator=torch.Generator().manual_seed(1)) for site in sites}
    chosen = make_groups(parse_grouping("top:any@0.2"), sites, lambda site: scores[site.name])
    for top, random in zip(chosen[::2], chosen[1::2]):
        inside, values = top.parts[0].columns, scores[top.parts[0].site]
        assert len(inside) == len(random.parts[0].columns) == round(0.2 * len(values))
        assert values[inside].min() >= values.topk(len(inside)).values.min()
    other = make_groups(parse_grouping("top:any@0.2"), sites, lambda site: scores[site.name], seed=1)
    assert any(a.parts[0].columns.tolist() != b.parts[0].columns.tolist() for a, b in zip(chosen[1::2], other[1::2]))
