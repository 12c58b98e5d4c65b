"""What levers cost, on timings made by hand: against sums by hand, and what is left out."""

from __future__ import annotations

import pytest

from geoquant.costs import CHANGE, cost_sentence, costs
from geoquant.plan.default_points import default_points
from geoquant.plan.points import Change, Point

LOAD, SOLVE = 2.0, 20.0


def timed(load=LOAD, solve=SOLVE, protect=0.0, refine=0.0, **more) -> dict:
    """A measurement; what only measures takes as long as it likes."""
    timings = {"load": load, "quantize": solve, "protect": protect, "refine": refine}
    timings |= {"measure the original": 50.0, "verify": 70.0, "quantize (CPU)": 33.0}
    return {"timings": {name: seconds for name, seconds in timings.items() if seconds} | more.pop("also", {}), **more}


def told(*pairs) -> dict[str, dict | None]:
    points, measured = zip(*pairs, strict=True)
    return dict(zip((point.name for point in points), costs(points, measured), strict=True))


ORIGINAL = (Point("original", "original", quantize=False), {"timings": None})
PLAIN = (Point("plain", "lattice", {"rate": 3.25}), timed())


def aimed(name: str, *, rate: float | None = 3.25, **options) -> Point:
    size = {} if rate is None else {"rate": rate}
    return Point(name, "anchor", {**size, "anchor": 0.7, "aim": "memory", **options})


def test_levers_and_the_rest_add_up_to_what_the_run_took_longer():
    found = told(ORIGINAL, PLAIN, (aimed("both", refine=8), timed(2.5, 21.0, 12.0, 40.0)))
    assert found["original"] is None
    assert found["plain"] == {
        **{"seconds": 22.0, "plain": "plain", "plain_seconds": 22.0, "extra": 0.0, "levers": {}, "rest": 0.0}
    }
    both = found["both"]
    assert (both["plain"], both["seconds"], both["extra"]) == ("plain", 75.5, 53.5)
    assert both["levers"] == {"anchor": 12.0, "refine": 40.0}
    assert both["rest"] == 1.5
    assert both["extra"] == sum(both["levers"].values()) + both["rest"]


def test_what_acts_while_layers_are_solved_is_all_that_such_a_run_takes_longer_for():
    found = told(PLAIN, (aimed("metric", aim="metric"), timed(2.0, 27.0, 1.5)))["metric"]
    assert (found["levers"], found["rest"]) == ({"anchor": 8.5}, 0.0)


def test_what_another_point_measured_is_counted_as_if_this_one_had():
    found = told(PLAIN, (aimed("first"), timed(protect=32.0)), (aimed("second"), timed(protect=2.0, borrowed=30.0)))
    assert found["first"]["levers"] == found["second"]["levers"] == {"anchor": 32.0}


def test_plain_is_the_point_of_the_same_size_whatever_its_defaults_are_called():
    """3.25 is the default rate; 4.25 has no plain point here; nor has what leaves the embeddings alone."""
    other = aimed("other size", rate=4.25)
    bare = aimed("embeddings as stored", embeddings=False)
    found = told(PLAIN, (aimed("no rate", rate=None), timed(protect=5.0)), (other, timed(protect=6.0)), (bare, timed()))
    assert found["no rate"]["plain"] == "plain"
    for name, levers in (("other size", {"anchor": 6.0}), ("embeddings as stored", {})):
        assert (found[name]["plain"], found[name]["extra"], found[name]["levers"]) == (None, None, levers)


def test_every_lever_has_its_own_name():
    release = Point("release", "guarantee", {"rate": 3.25, "epsilon": 8.0, "radius": 0.1})
    noise = Point("noise", "noise", {"rate": 3.25}, Change("noise", 0.25))
    klein = Point("klein", "shape", {"rate": 3.25, "method": "lattice-klein", "row_block": 1})
    box = Point("box", "rounding", {"bits": 3})
    keep = Point("keep", "shape", {"grid": "box", "bits": 3, "keep": 0.01})
    found = told(
        PLAIN,
        (release, timed(protect=3.0)),
        (noise, timed(also={CHANGE: 4.0})),
        (klein, timed(solve=50.0)),
        (box, timed(solve=5.0)),
        (keep, timed(solve=6.0)),
    )
    names = {"release": {"release": 3.0}, "noise": {"noise": 4.0}, "klein": {"klein": 30.0}, "keep": {"keep": 1.0}}
    assert {name: found[name]["levers"] for name in names} == names
    assert found["keep"]["plain"] == "box"
    assert all(found[name]["rest"] == 0 for name in names)


def test_runs_that_were_interrupted_or_not_made_here_tell_nothing():
    trained = Point("dp", "dp", {"rate": 3.25}, model="there")
    stopped = aimed("stopped")
    found = told((PLAIN[0], timed(resumed=True)), (stopped, timed(protect=1.0)), (trained, timed()))
    assert found["plain"] is None
    assert found["dp"] is None
    assert found["stopped"]["plain"] is None


def test_the_sentence_has_the_range_of_every_lever_or_there_is_none():
    pairs = [
        ORIGINAL,
        PLAIN,
        (aimed("a"), timed(protect=11.0)),
        (aimed("b", refine=8), timed(protect=22.0, refine=44.0)),
    ]
    sentence = cost_sentence([{"cost": cost} for cost in told(*pairs).values()])
    assert (
        "anchor 11 to 22 s (50% to 100% of the plain run, 2 points), refine 44 s (200% of the plain run, 1 point)"
        in (sentence)
    )
    assert "measuring, auditing and export are not counted" in sentence
    assert cost_sentence([{"cost": cost} for cost in told(ORIGINAL, PLAIN).values()]) is None


@pytest.mark.parametrize("rate", [3.25, 4.25])
def test_points_of_the_default_list_find_their_plain_one(rate):
    points = default_points()
    found = dict(zip((point.name for point in points), costs(points, [timed()] * len(points)), strict=True))
    for point in points:
        if point.quantize and point.recipe.get("rate") == rate and point.recipe.get("embeddings", True):
            assert found[point.name]["plain"] == f"lattice {rate:g}"
    assert found["keep 1%, babai 3 bits"]["plain"] == "babai 3 bits"
