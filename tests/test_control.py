"""The control matrix on measurements made by hand: rows, noise of differences, and which points nothing beats."""

from __future__ import annotations

import numpy as np
import pytest

from frontier_toy import RECORDS, measured, page_of
from geoquant.control import AXES, Z, control_matrix, noise_of, strongest_alone
from geoquant.plan.points import Change, Point
from geoquant.report import curve
from geoquant.report.frontier import goals_of, headline, render


def matrix(*parts: dict) -> dict:
    points = [Point("original", "original", quantize=False)]
    points += [Point(f"p{index}", "lattice", {"rate": 3.25}) for index in range(1, len(parts))]
    return control_matrix(points, parts)


def test_the_noise_of_a_difference_is_paired():
    """Against plain formulas: over windows and records, and DeLong's placements counted pair by pair."""
    parts = [measured(1), measured(2, loss=0.1, shift=0.3)]
    noise = noise_of(parts, "reference")
    assert noise.shape == (len(AXES), 2, 2)
    assert np.array_equal(noise, noise.transpose(0, 2, 1))
    for axis, values in ((1, [part["public"]["windows"] for part in parts]), (2, [part["domain"] for part in parts])):
        change = np.subtract(*values)
        assert noise[axis, 0, 1] == pytest.approx(Z * change.std(ddof=1) / len(change) ** 0.5)
    placed = []
    for part in parts:
        inside, outside = map(np.array, part["scores"]["reference"])
        wins = (inside[:, None] > outside).astype(float)
        placed.append((wins.mean(axis=1), wins.mean(axis=0)))
    variance = sum((placed[0][side] - placed[1][side]).var(ddof=1) / RECORDS for side in (0, 1))
    assert noise[3, 0, 1] == pytest.approx(Z * variance**0.5, rel=1e-6)


def test_leakage_is_two_sided():
    """An attack that finds members by their absence leaks as much as one that finds them."""
    found = matrix(measured(1, shift=1.0), measured(2, shift=-1.0), measured(3, shift=0.0))
    leaks = [row["primary"]["two_sided"] for row in found["rows"]]
    assert leaks[1] > 0.2 > leaks[2]
    assert [row["pareto"] for row in found["rows"]] == [False, False, True]
    assert found["rows"][1]["beaten_by"] == "p2"
    # Turned around, the scores of two such models are told apart by no more than their noise.
    assert noise_of([measured(1, shift=1.0), measured(2, shift=-1.0)], "reference")[3, 0, 1] < 0.2


def test_a_point_within_the_noise_of_a_better_one_stays():
    near, far = measured(2, loss=0.001, spread=0.05), measured(3, loss=0.2, spread=0.05)
    found = matrix(measured(1, spread=0.05), near, far)
    assert [row["pareto"] for row in found["rows"]] == [True, True, False]
    assert found["axes"] == list(AXES)
    assert "1.96 paired standard errors" in found["rule"]


def test_a_size_must_differ_by_more_than_rounding_of_a_rate():
    same, larger = measured(1, bits=3.33), measured(1, bits=3.4)
    assert [row["pareto"] for row in matrix(measured(1, bits=3.3), same, larger)["rows"]] == [True, True, False]


def test_files_that_differ_without_any_model_decide_nothing_about_leakage():
    parts = [measured(seed, shift=shift, verdict="the records differ") for seed, shift in ((1, 1.0), (2, 0.0))]
    found = matrix(*parts)
    assert found["axes"] == ["size", "public", "domain"]
    assert found["rows"][0]["pareto"]


def test_without_records_size_and_public_loss_remain():
    parts = [measured(1), measured(2, loss=0.3)]
    parts = [{**part, "domain": None, "scores": {}, "privacy": None} for part in parts]
    found = matrix(*parts)
    assert found["axes"] == ["size", "public"]
    assert [row["pareto"] for row in found["rows"]] == [True, False]
    assert found["rows"][0]["primary"] is None
    assert found["attacks"] == {"primary": None, "alone": None}


def test_the_strongest_attack_alone_is_the_farthest_from_chance():
    assert strongest_alone({"reference": 0.99, "loss": 0.6, "min-k": 0.35, "combined": 1.0, "quantile": 0.9}) == "min-k"
    assert strongest_alone({"reference": 0.99}) is None
    assert matrix(measured(1))["attacks"] == {"primary": "reference", "alone": "min-k"}


# ---- the page


def whole(*parts: dict) -> dict:
    return page_of(matrix(*parts), list(parts))


def test_the_page_says_what_was_left_out_what_failed_and_what_is_not_promised():
    sure = {
        "epsilon": 4.0,
        "delta": 1e-5,
        "adjacency": "any two weight vectors",
        "sentence": "Covers all. Does not cover: other releases.",
    }
    found = whole(measured(1), measured(2, shift=0.0, guarantee=sure))
    page = render(found)
    assert "Left out: &lt;b&gt;one&lt;/b&gt;" in page
    assert "it broke" in page
    assert "All other points: no formal guarantee." in page
    assert page.index("ε 4.00") < page.index("any two weight vectors")
    assert "Does not cover: other releases" in page
    assert "2 operating points, 1 that no other beats" in headline(found)
    assert [goal["point"] for goal in goals_of(found)] == ["p1"] * 4
    bare = whole(*({**part, "privacy": None, "scores": {}, "domain": None} for part in (measured(1), measured(2))))
    assert "leakage was not measured" in headline(bare)
    assert "Leakage was not measured: give --members" in render(bare)


def test_the_line_of_the_picture_joins_what_has_nothing_to_its_lower_left():
    generator = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(pair) for pair in generator.integers(0, 6, (12, 2)).tolist()]
        best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        assert curve.staircase(points) == sorted(best)


def test_every_row_has_a_dot_where_its_numbers_are():
    found = matrix(measured(1), measured(2, loss=0.02, shift=0.0))
    first, second = curve.dots(found["rows"], "public", here="p1")
    assert (first.x, first.here, second.here) == (0.0, False, True)
    assert second.x == pytest.approx(100 * np.expm1(found["rows"][1]["public"]["delta"]["value"]))
    assert second.y == found["rows"][1]["primary"]["two_sided"]
    drawn = curve.curve_panel([first, second], "rise of perplexity")
    assert drawn.count('class="point') == 2
    assert drawn.count('class="here"') == 1
    assert curve.curve_panel([], "") == ""


def test_an_interval_across_chance_reaches_down_to_it():
    row = matrix(measured(1))["rows"][0]
    for ci, wanted in (([0.45, 0.6], (0.0, 0.1)), ([0.6, 0.9], (0.1, 0.4)), ([0.1, 0.3], (0.2, 0.4))):
        (dot,) = curve.dots([row | {"primary": row["primary"] | {"ci": ci}}], "public")
        assert dot.y_interval == pytest.approx(wanted)


def test_a_lost_model_hides_no_other():
    assert curve.lost(50.0) == 1e6
    assert curve.bent(-3.0, curve.BEND) == -curve.bent(3.0, curve.BEND)


def test_changes_have_words():
    assert Change("interpolate", 0.4).words == "0.4 of the change from the base, all tensors"
    assert "four-bit steps on linear layers" in Change("noise", 1.2).words
