"""The compression-privacy curve: what marks a statement as confirmed, on rows made by hand; and all of it, tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import privacy_claims as marks  # noqa: E402
import privacy_curve as curve  # noqa: E402
import privacy_table as table  # noqa: E402

sys.path.remove(BENCHMARKS)

from geoquant.data.synthetic import synthetic_records  # noqa: E402
from geoquant.privacy.statistics import auc  # noqa: E402


def normal(shift: float, n: int = 200, noise: float = 0.1, seed: int = 0):
    """Scores of n + n records: the same records under every shift, with a little noise of the model's own."""
    common, own = np.random.default_rng(7), np.random.default_rng(seed)
    outside, inside = common.normal(0, 1, n), common.normal(0, 1, n)
    return [[*(inside + shift + noise * own.normal(size=n))], [*(outside + noise * own.normal(size=n))]]


def made_row(regime: str, point: str, shift: float = 1.0, **changes) -> dict:
    scores = normal(shift, seed=sum(map(ord, regime + point)))
    found = auc(*map(np.array, scores))
    row = {
        "regime": regime,
        "data": "medical",
        "point": point,
        "bits_per_weight": 16.0,
        "perplexity": 20.0,
        "nll": 3.0,
        "se": 0.01,
        "domain_nll": 1.0,
        "domain_se": 0.02,
        "delta_nll": {"value": 0.0, "se": 0.001},
        "domain_delta": {"value": 0.0, "se": 0.001},
        "attacks": {
            name: {"auc": found, "ci": [0.7, 0.8], "tpr": 0.1, "tpr_ci": [0.05, 0.2]} for name in ("loss", "reference")
        },
        "scores": {"reference": scores},
        "extraction": {"phone": extracted(0), "name": extracted(50)},
        "continued": {"32": extracted(7)},
        "exposure": {"canaries": 9, "mean": 5.0, "se": 0.5, "limit": 19.9, "control": 1.5},
    }
    if point not in ("original", "base"):
        for attack in row["attacks"].values():
            attack["change"] = {"value": -0.1, "ci": [-0.2, 0.0], "p": 0.04, "p_holm": 0.08}
    return row | changes


def extracted(hits: int, spans: int = 100) -> dict:
    control = {"control_spans": spans, "control_extracted": 0, "control_in_100": 0}
    return {"spans": spans, "extracted": hits, "ci": [0, 1], "in_100": hits} | control


def verdicts(*rows: dict) -> dict[str, marks.Verdict]:
    return {verdict.claim: verdict for verdict in marks.claims(rows)}


UTILITY, LOWERED, MORE = "8 bits keep utility", "8 bits lower the AUC", "4 bits lower the AUC more than 8"


# --- marks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("public", "domain", "kept"),
    [
        ((0.001, 0.001), (0.001, 0.001), True),
        ((-0.2, 0.001), (0.0, 0.001), True),  # better is kept, too
        ((0.0081, 0.001), (0.0, 0.001), False),  # 0.0081 + 1.96 * 0.001 > 0.01
        ((0.0080, 0.001), (0.0, 0.001), True),
        ((0.001, 0.02), (0.0, 0.001), False),  # nobody knows
        ((0.001, 0.001), (0.03, 0.001), False),  # one text is not enough
    ],
)
def test_utility_is_kept_where_both_intervals_say_so(public, domain, kept):
    deltas = {name: {"value": v, "se": s} for name, (v, s) in {"delta_nll": public, "domain_delta": domain}.items()}
    found = verdicts(made_row("mild", "original"), made_row("mild", "babai-8", **deltas))[UTILITY]
    assert found.confirmed is kept
    assert len(found.cases) == 1


def test_a_lower_auc_needs_the_paired_test():
    original = made_row("mild", "original", 1.0)
    for shift, confirmed in ((0.7, True), (0.99, False), (1.3, False)):
        found = verdicts(original, made_row("mild", "babai-8", shift))[LOWERED]
        assert found.confirmed is confirmed, shift
    # One regime or solver that says no is enough.
    lower, same = made_row("mild", "babai-8", 0.7), made_row("mild", "rtn-8", 1.0)
    found = verdicts(original, lower, same)[LOWERED]
    assert [case.confirmed for case in found.cases] == [True, False]
    assert found.mark == "not confirmed (1 of 2)"
    assert found.cases[0].where == "mild, babai"


def test_p_values_are_corrected_over_the_cases():
    """A change that alone would pass is one of ten tried."""
    rows = [made_row("mild", "original", 1.0), made_row("mild", "babai-8", 0.955)]
    assert verdicts(*rows)[LOWERED].confirmed
    others = [made_row(f"r{i}", point, 1.0) for i in range(9) for point in ("original", "babai-8")]
    alone, among = (verdicts(*some)[LOWERED].cases[0] for some in (rows, rows + others))
    p = [float(case.found.split(", p ")[1]) for case in (alone, among)]
    assert p[1] == pytest.approx(10 * p[0], rel=0.1)


def test_four_bits_are_compared_with_eight_of_the_same_solver():
    rows = [made_row("mild", "original", 1.0), made_row("mild", "babai-8", 1.0), made_row("mild", "babai-4", 0.6)]
    assert verdicts(*rows)[MORE].confirmed
    # Lower than the original, but no lower than at eight bits.
    rows = [made_row("mild", "original", 1.0), made_row("mild", "babai-8", 0.6), made_row("mild", "babai-4", 0.6)]
    assert not verdicts(*rows)[MORE].confirmed
    assert verdicts(made_row("mild", "rtn-8"), made_row("mild", "babai-4"))[MORE].cases == ()


@pytest.mark.parametrize(
    ("hits", "before", "after"),
    [(0, True, False), (1, False, False), (10, False, False), (67, False, False), (680, False, True)],
)
def test_leaks_must_lie_in_their_window_with_the_whole_interval(hits, before, after):
    """0 of 100: 0 to 3.6%; 1 of 100: up to 5.4%; 67 of 100: 57 to 76%; 680 of 1000: 65 to 71%."""
    spans = 1000 if hits > 100 else 100
    parts = {"extraction": {"phone": extracted(hits, spans), "name": extracted(99)}}  # names do not count
    found = verdicts(made_row("mild", "base", **parts), made_row("mild", "original", **parts))
    assert found["before fine-tuning 0-5% of the identifiers leak"].confirmed is before
    assert found["after fine-tuning 60-75% leak"].confirmed is after


def ladder(auc_at, exposure_at=lambda step: 5.0) -> list[dict]:
    """Points that get worse step by step."""
    rows = []
    for step in range(10):
        row = made_row("mild", f"p{step}", nll=3.0 + 0.1 * step)
        row["attacks"]["reference"]["auc"] = auc_at(step)
        row["exposure"] = row["exposure"] | {"mean": exposure_at(step)}
        rows.append(row)
    return [made_row("mild", "base", nll=9.0), *rows]


def test_going_together_is_a_rank_correlation_with_its_interval():
    claim, other = "the better the model, the better the attack", "the better the model, the higher the exposure"
    found = verdicts(*ladder(lambda step: 0.9 - 0.01 * step, lambda step: 20.0 - step**3 / 100))
    assert found[claim].confirmed
    assert found[other].confirmed
    assert "10 points" in found[claim].cases[0].found  # without the base
    assert not verdicts(*ladder(lambda step: 0.9 + 0.01 * step))[claim].confirmed
    zigzag = verdicts(*ladder(lambda step: 0.9 - 0.01 * (step ^ 5)))[claim]
    assert not zigzag.confirmed
    constant = verdicts(*ladder(lambda step: 1.0))[claim]
    assert not constant.confirmed
    assert constant.cases[0].found == "AUC 1 at all 10 points"


def test_the_interval_of_a_rank_correlation_holds_the_truth():
    """By simulation: normal pairs of 11 points, whose Spearman correlation is 6/pi asin(rho/2)."""
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.6, 0.9):
        truth, held = 6 / np.pi * np.arcsin(rho / 2), 0
        for _ in range(1000):
            x = rng.normal(size=11)
            y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=11)
            low, high = marks.rank_interval(float(spearmanr(x, y).statistic), 11)
            held += low <= truth <= high
        assert 0.92 < held / 1000 < 0.99, rho
    low, high = marks.rank_interval(1.0, 11)
    assert 0.8 < low < high < 1.0


def test_nothing_is_confirmed_by_nothing():
    assert all(not verdict.confirmed for verdict in marks.claims([]))
    assert {verdict.mark for verdict in marks.claims([])} == {"not confirmed (0 of 0)"}


# --- points and tables --------------------------------------------------------------------------------------


def test_points_are_filtered_and_those_that_are_there_are_skipped():
    everything = curve.chosen([], None, [])
    assert len(everything) == len(curve.LEARNED) * len(curve.POINTS)
    assert everything[:2] == [("mild", "base"), ("mild", "original")]
    mild = curve.chosen(["regime=mild", "solver=rtn"], None, [])
    assert mild == [("mild", "rtn-8"), ("mild", "rtn-4"), ("mild", "rtn-3")]
    assert curve.chosen(["regime=mild"], ["rtn-8", "rtn-4"], [{"regime": "mild", "point": "rtn-8"}]) == [
        ("mild", "rtn-4")
    ]
    assert curve.chosen(["data=code"], ["base"], []) == [("code", "base")]
    with pytest.raises(SystemExit, match="nothing has regime = mlid; regimes: mild"):
        curve.chosen(["regime=mlid"], None, [])
    with pytest.raises(SystemExit, match="no such points: babai-5; there are base, original"):
        curve.chosen([], ["babai-5"], [])


def test_the_table_says_what_the_rows_say(capsys):
    rows = [made_row("mild", "base"), made_row("mild", "original"), made_row("mild", "babai-4", 0.5)]
    del rows[0]["attacks"]["reference"]
    for name in ("quantile", "combined"):  # they look at the reference too
        rows[1]["attacks"][name] = {"auc": 1.0, "ci": [0.9, 1.0], "tpr": 1.0, "tpr_ci": [0.9, 1.0]}
    table.show(rows)
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.count("|") == len(table.COLUMNS) + 1 for line in lines)
    assert lines[3].startswith("| babai-4 | 16.00 | 20.00 ± 0.20 | 1.000 ± 0.020 |")
    assert "-0.100, p = 0.08" in lines[3]
    assert "0 of 100 (0 of 100)" in lines[3]
    assert "| 7 of 100 (0 of 100) |" in lines[3]
    assert "strongest attack on the original is loss" in text
    assert "- **8 bits keep utility: not confirmed (0 of 0)**" in text


def test_the_picture_is_the_same_each_time(tmp_path):
    rows = [
        made_row("mild", name, bits_per_weight=bits) for name, bits in (("original", 16), ("rtn-4", 4), ("rtn-3", 3))
    ]
    for name in ("a.svg", "b.svg"):
        table.draw([*rows, made_row("strong", "babai-4", exposure=None)], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "identifiers extracted" in (tmp_path / "a.svg").read_text()


def test_the_whole_curve_on_a_tiny_model(tiny_model_dir, tmp_path, monkeypatch, capsys):
    """Killed in the middle, continued, shown."""
    records = synthetic_records("support", 100, seed=0, canaries=12, repeats=(2,))
    text = "Words of a text that everybody may read, one after the other. " * 60
    monkeypatch.setattr("geoquant.measure.builtin_text", lambda: text)
    monkeypatch.setattr(curve, "DATA", {"medical": lambda: records})
    monkeypatch.setattr(curve, "LEARNED", {"some": ("medical", curve.Regime("some", 0.5, 0.7))})
    training = {"epochs": 12, "lr": 1e-2, "batch": 8, "check_every": 5, "checkpoint_every": 5, "most": 30}
    monkeypatch.setattr(curve, "TRAINING", {"medical": training})
    monkeypatch.setattr(curve, "CALIBRATION", {"windows": 4, "window": 64, "target": "weights"})
    monkeypatch.setattr(curve, "PUBLIC", (64, 5))
    small = {"bits": 3, "group_size": 16, "metric": "plain"}
    points = {
        "base": None,
        "original": None,
        "babai-3": small | {"method": "babai"},
        "rtn-3": small | {"method": "rtn"},
    }
    monkeypatch.setattr(curve, "POINTS", points)
    curve.made.cache_clear()
    arguments = ["privacy_curve.py", str(tmp_path / "out"), "--model", str(tiny_model_dir)]
    monkeypatch.setattr(sys, "argv", arguments)

    taken = curve.pipeline.quantize

    def killed(recipe, *rest, **options):
        if recipe.method == "rtn":
            raise KeyboardInterrupt
        return taken(recipe, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(curve.pipeline, "quantize", killed)
        with pytest.raises(KeyboardInterrupt):
            curve.main()
    path = tmp_path / "out" / "points.jsonl"
    half = path.read_text()
    assert [json.loads(line)["point"] for line in half.splitlines()] == ["base", "original", "babai-3"]
    curve.main()
    curve.main()  # nothing left to do
    assert path.read_text().startswith(half)
    rows = {row["point"]: row for row in curve.read_rows(path)}
    assert list(rows) == list(points)

    first, last = rows["original"], rows["rtn-3"]
    assert first["finetune"]["attack"]["auc"] >= 0.6
    kept = auc(*map(np.array, first["scores"]["reference"]))  # of five digits: a close pair may change places
    assert first["attacks"]["reference"]["auc"] == pytest.approx(kept, abs=3e-3)
    assert "reference" not in rows["base"]["attacks"]
    change = last["attacks"]["reference"]["change"]["value"]
    assert change == pytest.approx(last["attacks"]["reference"]["auc"] - first["attacks"]["reference"]["auc"])
    assert last["delta_nll"]["value"] == pytest.approx(last["nll"] - first["nll"])
    assert last["domain_delta"]["value"] == pytest.approx(last["domain_nll"] - first["domain_nll"])
    assert last["bits_per_weight"] == 4.0  # 3 bits, and 16 for the scale of 16 columns
    assert first["domain_nll"] < rows["base"]["domain_nll"]
    assert first["exposure"]["canaries"] == len(records.split.canaries)
    assert first["extraction"]["all"]["spans"] > 50
    assert first["continued"]["32"]["spans"] == len(records.members)
    assert set(last["attacks"]) == {
        "loss",
        "zlib",
        "min-k",
        "min-k++",
        "neighbourhood",
        "reference",
        "combined",
    }
    assert "change" not in last["attacks"]["combined"]
    assert not any((tmp_path / "out" / "runs").iterdir())

    monkeypatch.setattr(sys, "argv", [*arguments, "--table", "--figure", str(tmp_path / "curve.svg")])
    capsys.readouterr()
    curve.main()
    assert "### some (medical)" in capsys.readouterr().out
    assert (tmp_path / "curve.svg").exists()

    # A regime that training does not reach is named in the end, and stops no other.
    never = {"never": ("medical", curve.Regime("never", 1.0, 1.0))}
    monkeypatch.setattr(curve, "LEARNED", never | curve.LEARNED)
    monkeypatch.setattr(curve, "TRAINING", {"medical": training | {"epochs": 1, "lr": 1e-6}})
    monkeypatch.setattr(sys, "argv", [arguments[0], str(tmp_path / "other"), *arguments[2:]])
    with pytest.raises(
        SystemExit, match=r"never: training on medical ended before the regime never; more epochs"
    ) as told:
        curve.main()
    assert "some: training on medical ended" in str(told.value)
    assert [row["point"] for row in curve.read_rows(tmp_path / "other" / "points.jsonl")] == ["base", "base"]
    monkeypatch.setattr(curve, "PUBLIC", (64, 4))
    with pytest.raises(SystemExit, match="was begun with other settings"):
        curve.main()
    curve.made.cache_clear()
