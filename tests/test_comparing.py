"""The chosen point against the baselines, on measurements made by hand whose verdicts are known; and the page of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from frontier_toy import RECORDS, measured, page_of
from geoquant.cli.frontier import show
from geoquant.comparing import Z, against_baselines, check_chosen, pick, share_noise
from geoquant.control import control_matrix
from geoquant.errors import UserError
from geoquant.plan.dominance import BASELINES
from geoquant.plan.points import Change, Point
from geoquant.plan.published import PUBLISHED, radius
from geoquant.privacy.guarantee.gaussian import gaussian_delta
from geoquant.report import curve
from geoquant.report.frontier import render

ORIGINAL = Point("original", "original", quantize=False)


def made(*points: tuple[Point, dict]):
    """(matrix, measurements) of an original that leaks, and of the points."""
    parts = [measured(1, bits=16.0, shift=1.5), *(part for _, part in points)]
    return control_matrix([ORIGINAL, *(point for point, _ in points)], parts), parts


def rated(name, family, rate=3.25, **recipe) -> Point:
    return Point(name, family, {"rate": rate, **recipe})


LEVER = rated("lever", "anchor"), measured(2, bits=3.3, loss=0.05, shift=0.4)
SMALL = rated("small", "lattice", 3.0), measured(3, bits=3.3, loss=0.05, shift=1.5)  # as large and dear, leaks more
LARGE = rated("large", "lattice", 8.0), measured(4, bits=8.0, loss=0.0, shift=1.5)
BACK = rated("back", "interpolation"), measured(5, bits=3.3, loss=0.20, shift=0.2)
HALF = rated("half", "interpolation"), measured(6, bits=3.3, loss=0.10, shift=1.0)
LOUD = Point("loud", "noise", {}, Change("noise", 0.5), quantize=False), measured(7, bits=16.0, loss=0.5, shift=1.0)


def verdicts(told: dict) -> dict:
    return {one["family"]: one for one in told["families"]}


def test_known_verdicts():
    told = against_baselines(*made(LEVER, SMALL, LARGE, BACK, HALF, LOUD))
    assert told["chosen"] == "lever"
    assert told["why"] == "of the points with levers the one for --goal private"
    assert told["measures"] == ["size", "public", "domain", "leakage"]
    fewer, back, noise = told["families"]
    assert (fewer["points"], fewer["dominated"]) == (2, ["small"])
    (large,) = fewer["not_dominated"]
    assert (large["name"], large["better_than_chosen"]) == ("large", ["public", "domain"])
    assert large["worse_than_chosen"] == ["size", "leakage"]
    assert fewer["least"]["leakage"] > fewer["leakage"]
    assert fewer["any"] == {"public": None, "domain": None}
    level, least = fewer["leakage"], fewer["least"]
    assert fewer["verdict"] == (
        "Fewer bits: 1 of 2 points are dominated. Not 'large' (better on loss on public text and loss on unseen "
        f"records). None leaks as little as the chosen point (|AUC - 0.5| {level:.3f}): the least is "
        f"{least['leakage']:.3f} ({least['name']!r})."
    )
    assert back["dominated"] == ["half"]
    assert noise["verdict"].startswith("Isotropic noise: 1 of 1 points are dominated. None leaks")
    assert [one["standing"] for one in told["families"]] == ["never", "dearer", "never"]
    assert told["sentence"] == (
        "'lever' dominates 1 of 2 points of fewer bits, 1 of 2 points of interpolation and 1 of 1 points of isotropic "
        "noise. No baseline dominates it. At its leakage, at any size: more loss with interpolation; out of "
        "reach of fewer bits and isotropic noise."
    )


def test_what_a_family_costs_at_the_leakage_is_linear_between_its_points_and_paired():
    matrix, parts = made(LEVER, BACK, HALF)
    found = verdicts(against_baselines(matrix, parts))["interpolation"]
    near, far = (row["primary"]["two_sided"] for row in matrix["rows"][2:])
    level = matrix["rows"][1]["primary"]["two_sided"]
    share = (level - near) / (far - near)
    read = found["any"]["public"]
    assert 0 < share < 1
    assert read["between"] == ["back", "half"]
    assert read["share"] == pytest.approx(share)
    lever, back, half = (np.array(part["public"]["windows"]) for part in parts[1:])
    change = (1 - share) * back + share * half - lever
    assert read["above_chosen"]["value"] == pytest.approx(change.mean())
    assert read["above_chosen"]["se"] == pytest.approx(change.std(ddof=1) / len(change) ** 0.5)
    # All are of one size, and the sentence says both texts with their intervals.
    assert found["no_larger"] == found["any"]
    rise, half_width = 100 * math.expm1(change.mean()), Z * read["above_chosen"]["se"]
    low, high = (100 * math.expm1(change.mean() + sign * half_width) for sign in (-1, 1))
    assert f"beside that one's is {rise:+.1f}% on public text ({low:+.1f}% to {high:+.1f}%)" in found["verdict"]
    assert found["verdict"].endswith("at no larger a size.")


def test_a_larger_point_serves_the_family_at_any_size_only():
    wide = rated("wide", "interpolation", 8.0), measured(8, bits=8.0, loss=0.01, shift=0.1)
    told = against_baselines(*made(LEVER, HALF, wide))
    found = verdicts(told)["interpolation"]
    assert found["any"]["public"]["between"] == ["wide"]  # less leakage and less loss: nothing to mix
    assert found["no_larger"] == {"public": None, "domain": None}
    assert found["verdict"].endswith("no point that is no larger leaks as little.")
    assert found["lines"]["any"]["public"] == ["wide"]
    assert found["lines"]["no_larger"]["public"] == ["half"]
    both = against_baselines(*made(LEVER, BACK, HALF, wide))
    assert "; with points that are no larger, +" in verdicts(both)["interpolation"]["verdict"]


def test_a_baseline_that_dominates_the_chosen_point_is_named():
    better = rated("better", "interpolation"), measured(9, bits=3.3, loss=0.0, shift=0.0)
    told = against_baselines(*made(LEVER, better))
    assert verdicts(told)["interpolation"]["dominating"] == ["better"]
    assert "The chosen point is dominated by 'better'." in verdicts(told)["interpolation"]["verdict"]
    assert told["sentence"].endswith(
        "Dominated by 'better'. At its leakage, at any size: less loss with interpolation."
    )


def test_exposure_and_extraction_are_measures_too():
    """A point with the same figures but for planted secrets; the same canaries, whose differences are of one kind."""
    bits = np.random.default_rng(0).uniform(0, 15, 16)
    lever = LEVER[0], measured(2, loss=0.05, shift=0.4, canaries=bits, extracted=0)
    parts = {
        "told": {"canaries": bits + 3, "extracted": 0},
        "near": {"canaries": bits + np.random.default_rng(1).normal(0, 1, 16), "extracted": 1},
        "said": {"canaries": bits, "extracted": 30},
        "less": {"canaries": np.maximum(bits - 3, -1.0), "extracted": 0},
        "unknown": {},
    }
    made_of = [(rated(name, "lattice"), measured(2, loss=0.05, shift=0.4, **own)) for name, own in parts.items()]
    matrix, measurements = made(lever, *made_of)
    told = against_baselines(matrix, measurements, "lever")
    found = verdicts(told)["fewer bits"]
    assert told["measures"][-2:] == ["exposure", "extraction"]
    assert found["dominated"] == ["told", "said"]
    others = {one["name"]: one for one in found["not_dominated"]}
    assert others["less"]["better_than_chosen"] == ["exposure"]
    assert others["unknown"]["missing"] == ["exposure", "extraction"]
    assert "'less' (better on exposure)" in found["verdict"]
    assert "'near' (not told apart)" in found["verdict"]
    assert "'unknown' (exposure and extraction measured of one of the two alone)" in found["verdict"]


def test_one_canary_tells_nothing_apart():
    lever = LEVER[0], measured(2, loss=0.05, shift=0.4, canaries=[1.0])
    other = rated("other", "lattice"), measured(2, loss=0.05, shift=0.4, canaries=[15.0])
    assert verdicts(against_baselines(*made(lever, other), "lever"))["fewer bits"]["dominated"] == []


@pytest.mark.parametrize(
    ("one", "other", "lower"),
    [
        ((56, 70), (48, 80), 0.0524),
        ((9, 10), (3, 10), 0.1705),
        ((5, 56), (0, 29), -0.0381),
        ((10, 10), (0, 20), 0.6791),
    ],
)
def test_the_noise_of_two_shares_is_that_of_newcombe(one, other, lower):
    """Lower limits of the difference in table II of the paper, method 10."""
    difference = one[0] / one[1] - other[0] / other[1]
    assert difference - share_noise(one, other) == pytest.approx(lower, abs=6e-5)
    assert share_noise(one, other) == share_noise(other, one)


# ---- which point


def test_the_point_is_the_one_that_is_asked_for_or_that_a_goal_takes():
    matrix, _ = made(LEVER, SMALL, BACK)
    rows, axes = matrix["rows"], matrix["axes"]
    assert pick(rows, axes, "back") == ("back", "as asked")
    assert pick(rows, axes, "small") == ("small", "as asked")  # a point's name goes before a goal's
    assert pick(rows, axes, "balanced")[1] == "the point that --goal balanced takes"
    assert pick(rows, axes, "gone") == (None, "the point 'gone' was not measured")
    name, why = pick(rows, axes, "certified")
    assert name is None
    assert "no point of the frontier has a formal guarantee" in why
    check_chosen(None, ["lever"])
    check_chosen("private", ["lever"])
    with pytest.raises(UserError, match=r"unknown point or goal 'levr'.*did you mean 'lever'"):
        check_chosen("levr", ["original", "lever"])
    with pytest.raises(UserError, match="unknown point or goal 'original'"):
        check_chosen("original", ["original", "lever"])


def test_a_lever_that_no_goal_private_admits_is_taken_by_balance():
    dear = rated("dear", "anchor"), measured(2, bits=3.3, loss=0.5, shift=0.4)
    matrix, _ = made(dear, SMALL)
    name, why = pick(matrix["rows"], matrix["axes"])
    assert name == "dear"
    assert why.endswith("for none serves --goal private")


# ---- the page


def plain(found: dict) -> str:
    return render(found).replace("&#39;", "'")


def test_the_lines_of_the_picture_go_through_their_points_straight_in_nats():
    wide = rated("wide", "interpolation", 8.0), measured(8, bits=8.0, loss=0.01, shift=0.6)
    matrix, parts = made(LEVER, BACK, HALF, wide)
    told = against_baselines(matrix, parts)["families"]
    signs = {family: members[0] for family, members in BASELINES.items()}
    rows = {row["name"]: row for row in matrix["rows"]}
    dashed, solid = curve.family_lines(matrix["rows"], told, signs, "domain")
    assert (dashed.dashed, solid.dashed) == (True, False)
    assert {dashed.family, solid.family} == {"interpolation"}
    for one, names in ((dashed, ["back", "wide"]), (solid, ["back", "half"])):
        ends = [(rows[name]["domain"]["delta"]["value"], rows[name]["primary"]["two_sided"]) for name in names]
        assert one.places[0] == pytest.approx((100 * math.expm1(ends[0][0]), ends[0][1]))
        assert one.places[-1] == pytest.approx((100 * math.expm1(ends[1][0]), ends[1][1]))
        nats, leaks = np.log1p(np.array(one.places)[:, 0] / 100), np.array(one.places)[:, 1]
        assert np.polyval(np.polyfit(nats, leaks, 1), nats) == pytest.approx(leaks)
    # Drawn once where all points are no larger than the chosen one.
    matrix, parts = made(LEVER, BACK, HALF)
    (line,) = curve.family_lines(matrix["rows"], against_baselines(matrix, parts)["families"], signs, "public")
    assert not line.dashed


def test_the_page_has_the_sentences_the_lines_and_the_mark(capsys, tmp_path):
    matrix, parts = made(LEVER, SMALL, LARGE, BACK, HALF, LOUD)
    found = page_of(matrix, parts)
    page = " ".join(plain(found).split())
    assert found["baselines"]["sentence"] in page
    for one in found["baselines"]["families"]:
        assert one["verdict"] in page
    assert page.count('class="here"') == 3  # in both pictures and once in the legend
    assert page.count('class="family f-interpolation"') == 2  # solid: both of its points are no larger
    assert page.count('class="family f-rounding') == 0  # nothing undercuts `large`: one point is no line
    show(found | {"left_out": [], "failed": []}, tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert found["baselines"]["sentence"] in shown
    assert found["baselines"]["families"][1]["verdict"] in shown


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ((LEVER,), "'lever': no baseline was measured."),
        ((SMALL, BACK), "No point is compared with the baselines: no point with a lever was measured."),
        ((), "no point with a lever was measured"),
    ],
)
def test_a_frontier_without_baselines_or_levers_has_a_page(points, said):
    found = page_of(*made(*points))
    assert said in found["baselines"]["sentence"]
    page = plain(found)
    assert said in page
    assert 'class="family' not in page or points == (SMALL, BACK)


def test_without_attacks_nothing_is_chosen_but_what_is_asked_for():
    matrix, parts = made(LEVER, SMALL)
    bare = [{**part, "privacy": None, "scores": {}, "domain": None} for part in parts]
    points = [ORIGINAL, LEVER[0], SMALL[0]]
    matrix = control_matrix(points, bare)
    found = page_of(matrix, bare)
    assert found["baselines"]["chosen"] is None
    assert "the records give no figure of leakage to choose by" in render(found)
    asked = page_of(matrix, bare, "lever")
    assert asked["baselines"]["measures"] == ["size", "public"]
    page = plain(asked)
    assert "Fewer bits: 0 of 1 points are dominated. Not 'small' (not told apart). Leakage was not compared." in page
    assert page.count("not measured") >= 7  # every counterpart of the published matrix


def test_records_that_differ_by_themselves_leave_leakage_out():
    parts = [measured(1, verdict="they differ"), measured(2, shift=0.0), measured(3)]
    matrix = control_matrix([ORIGINAL, LEVER[0], SMALL[0]], parts)
    assert against_baselines(matrix, parts)["chosen"] is None
    told = against_baselines(matrix, parts, "lever")
    assert "leakage" not in told["measures"]
    assert "least" not in told["families"][0]


# ---- the published matrix


def test_published_settings_stand_beside_their_counterparts():
    sure = {
        "epsilon": 8.0,
        "delta": 1e-5,
        "adjacency": "any two weight vectors within 0.003",
        "sentence": "s",
        "noise": "1.3 steps of the grid",
    }
    box = {"grid": "box", "bits": 4}
    four = Point("babai 4", "rounding", {**box, "method": "babai"}), measured(10, loss=0.1)
    nearest = Point("rtn 4", "rounding", {**box, "method": "rtn"}), measured(11, loss=0.2)
    three = Point("rtn 3", "rounding", {"grid": "box", "bits": 3}), measured(12, loss=0.2)
    inside = Point("loud and 4", "noise", box, Change("noise", 0.5)), measured(13, loss=0.6)
    coarse = Point("loud and 3.25", "noise", {"rate": 3.25}, Change("noise", 1.2)), measured(14, loss=0.6)
    ball = rated("ball", "guarantee"), measured(15, loss=0.4, guarantee=sure)
    matrix, parts = made(four, nearest, three, LOUD, coarse, ball)
    found = page_of(matrix, parts)
    told = found["published"]
    assert [one["published"] for one in told] == [
        {"epsilon": None, "noise": 0.0, "rise": 0.05, "success": 0.75},
        {"epsilon": 8.0, "noise": 0.5, "rise": 0.12, "success": 0.62},
        {"epsilon": 2.0, "noise": 1.2, "rise": 0.28, "success": 0.55},
        {"epsilon": 1.0, "noise": 2.0, "rise": 0.5, "success": 0.51},
    ]
    assert [one["same_noise"] and one["same_noise"]["name"] for one in told] == ["rtn 4", "loud", None, None]
    assert [one["same_epsilon"] and one["same_epsilon"]["name"] for one in told] == [None, "ball", None, None]
    row, first = matrix["rows"][2], matrix["rows"][0]
    rise = told[0]["same_noise"]["rise"]
    assert rise["value"] == pytest.approx(row["public"]["perplexity"] - first["public"]["perplexity"])
    assert rise["se"] == pytest.approx(row["public"]["perplexity"] * row["public"]["delta"]["se"])
    assert told[1]["same_noise"]["epsilon"] is None
    # Rounded to 4 bits as well goes before noise alone.
    assert page_of(*made(LOUD, inside))["published"][1]["same_noise"]["name"] == "loud and 4"
    page = render(found)
    ours = page[page.index('id="published"') :]
    assert page.count("not measured</td>") == 4
    assert ours.index("ε 8.00") < ours.index("any two weight vectors within 0.003")
    assert "1.3 steps of the grid" in ours
    assert "embeddings, norms and biases carry no noise" in ours


def test_a_published_epsilon_holds_for_neighbours_within_its_radius():
    """The Gaussian mechanism at that distance has exactly that epsilon at delta 1e-5, by its own formula."""
    assert radius(PUBLISHED[0]) is None
    for setting in PUBLISHED[1:]:
        mu = radius(setting) / setting.noise
        assert gaussian_delta(setting.epsilon, mu) == pytest.approx(1e-5, rel=1e-3)


def test_right_guesses_are_of_the_attack_of_the_matrix():
    """Separated scores: all right."""
    apart = {**measured(1), "scores": {"reference": [[3.0] * RECORDS, [None] * RECORDS]}}
    found = page_of(control_matrix([ORIGINAL, Point("rtn 4", "rounding", {"bits": 4})], [apart, apart]), [apart, apart])
    assert found["published"][0]["same_noise"]["guessed"] == {"value": 1.0, "se": 0.0}
