"""Operating points: the default list, files of points, and what is refused in them."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic.fields import FieldInfo

from geoquant.charting import _key
from geoquant.errors import UserError
from geoquant.plan.default_points import default_points
from geoquant.plan.points import FAMILIES, INPUTS, NAME, Change, Point, check_names, fitting, read_points
from geoquant.recipe import Recipe, checked

EVERYTHING = ("base", "private", "domain")


def written(tmp_path, text: str):
    path = tmp_path / "points.toml"
    path.write_text(text)
    return path


def test_the_default_list_is_sound():
    points = default_points()
    check_names(points)
    assert {point.family for point in points} <= set(FAMILIES)
    assert all(NAME.fullmatch(point.name) for point in points)
    kept, _ = fitting(points, EVERYTHING)
    for point in kept:
        checked({"model": "m", **point.recipe})
    assert {"original", "rtn 3 bits", "lattice 3.25", "noise 0.5", "interpolate 0.4, lattice 3.25"} <= {
        p.name for p in kept
    }


def test_the_default_list_grows_with_the_levers():
    """By their fields: an aim that does not exist yet, and passes of refinement."""
    fields = {"aim": FieldInfo(annotation=Literal["everything", "sharp"]), "refine": FieldInfo(annotation=int)}
    before, after = ({point.name for point in default_points(some)} for some in (Recipe.model_fields, fields))
    assert "anchor 0.5 by sharp, lattice 3.25" in after - before
    assert "refine, lattice 3.25" in before
    assert not any("metric" in name for name in before)  # nothing goes with it
    assert "anchor 0.7 by sharp, refine, lattice 4.25" in after
    assert "original" in {point.name for point in default_points({})}


def test_what_cannot_be_made_is_left_out_with_a_reason():
    points = [
        Point("one", "own", {"rate": 3.0}),
        Point("two", "own", {"rate": 3.0, "spin": 2}),
        Point("three", "own", {"spin": 3}),
        Point("four", "own", {}, Change("interpolate", 0.5), needs=("base",)),
    ]
    kept, lines = fitting(points, ())
    assert [point.name for point in kept] == ["one"]
    assert lines == (
        "left out: two; three (this version has no option spin)",
        "left out: four (they need --base)",
    )
    assert len(fitting(points[:1] + points[3:], ("base",))[0]) == 2
    assert "left out: five (unknown aim 'sideways'" in fitting([Point("five", "own", {"aim": "sideways"})], ())[1][0]


def test_a_file_of_points(tmp_path):
    found = read_points(
        written(
            tmp_path,
            '["small one"]\nrate = 2.5\n[way]\ninterpolate = 0.25\nbits = 3\nfamily = "interpolation"\n'
            "[loud]\nnoise = 1\nquantize = false\n[back]\nrate = 3\nanchor = 0.5\n"
            '["by private records"]\nanchor = 0.5\nneeds = ["base", "private"]\n',
        )
    )
    assert found == (
        Point("original", "original", quantize=False),
        Point("small one", "own", {"rate": 2.5}),
        Point("way", "interpolation", {"bits": 3}, Change("interpolate", 0.25), needs=("base",)),
        Point("loud", "own", {}, Change("noise", 1.0), quantize=False),
        Point("back", "own", {"rate": 3, "anchor": 0.5}, needs=("base",)),
        Point("by private records", "own", {"anchor": 0.5}, needs=("base", "private")),
    )
    for aim, needs in (("everything", ("base",)), ("memory", INPUTS), ("metric", INPUTS)):
        path = written(tmp_path, f'[one]\nrate = 3\nanchor = 0.5\naim = "{aim}"\n')
        assert read_points(path)[1].needs == tuple(needs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no points"),
        ("[a", "is not valid TOML"),
        ("rate = 3", "'rate' is not a point; wanted a table"),
        ("[a]\nrat = 3", r"point 'a': unknown option 'rat'; wanted one of .*; did you mean 'rate'\?"),
        ("[a]\nrate = 99", "point 'a': option rate: Input should be less than or equal to 8"),
        ("[a]\nrate = 3\nbits = 3", "point 'a': a rate belongs to the lattice"),
        ('[a]\nmembers = "x"', "sets members, which all points share; give it on the command line"),
        ('[a]\nrate = 3\nfamily = "latice"', "did you mean 'lattice'"),
        ("[a]\ninterpolate = 1.5", "interpolate; got 1.5; wanted a number from 0 to 1"),
        ("[a]\nnoise = true", "noise; got True"),
        ("[a]\nnoise = 1\ninterpolate = 1", "wanted one of them"),
        ("[a]\nquantize = false", "nothing to do"),
        ("[a]\nquantize = false\nnoise = 1\nrate = 3", "is not quantized; got rate"),
        ('[a]\nneeds = "base"', "needs; got 'base'; wanted a list of base, private, domain"),
        ("[a]\nquantize = 1", "wanted true or false"),
        ('["a/b"]\nrate = 3', "a name becomes a folder"),
        ('["..."]\nrate = 3', "a name becomes a folder"),
        ("[original]\nrate = 3", "this name is taken"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_points(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no file of points"):
        read_points(tmp_path / "none.toml")


def test_names_that_would_share_a_folder_are_refused():
    with pytest.raises(UserError, match="two points are called 'a'"):
        check_names([Point("A", "own"), Point("a", "own")])


def test_a_point_may_follow_a_plan_whose_content_decides(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    (point,) = read_points(written(tmp_path, f'["as planned"]\nplan = "{plan}"\n'))[1:]
    assert point.needs == ("base",)
    before = _key("frontier", point, {})
    assert _key("frontier", point, {}) == before
    plan.write_text('{"schema": 1}')
    assert _key("frontier", point, {}) != before
    plan.unlink()
    with pytest.raises(UserError, match=r"no file .*plan\.json"):
        _key("frontier", point, {})
