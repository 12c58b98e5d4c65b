"""Recipes: what is refused and how, and that TOML carries every one of them unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from geoquant.cli.options import RecipeFlags
from geoquant.errors import UserError
from geoquant.recipe import Recipe, checked, load_recipe, located, recipe_toml

PATHS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)
RECIPES = st.builds(
    Recipe,
    model=PATHS,
    bits=st.integers(2, 8),
    group_size=st.integers(1, 4096),
    symmetric=st.booleans(),
    keep=st.floats(0, 0.5),
    damping=st.none() | st.floats(1e-12, 1.0),
    sequential=st.sampled_from(["off", "block", "site"]),
    target=st.sampled_from(["weights", "outputs"]),
    calibration=st.none() | PATHS,
    formats=st.lists(st.sampled_from(["compressed-tensors", "dense"])).map(tuple),
    verify=st.booleans(),
    seed=st.integers(0, 2**31),
)


def test_toml_carries_every_control_character():
    recipe = Recipe(model="".join(map(chr, range(0xA0))) + "\r\n\u2028")
    assert tomllib.loads(recipe_toml(recipe))["model"] == recipe.model


@pytest.mark.parametrize("text", ["[]", "null", "3", '"model"', "[[1, 2]]"])
def test_what_is_no_recipe_at_all_is_a_validation_error(text):
    with pytest.raises(ValidationError):
        Recipe.model_validate_json(text)


@settings(deadline=None)
@given(RECIPES)
def test_toml_carries_every_recipe_unchanged(recipe):
    assert Recipe(**tomllib.loads(recipe_toml(recipe))) == recipe


@pytest.mark.parametrize(
    ("given_", "grid"),
    [
        ({}, "lattice"),
        ({"rate": 2.0}, "lattice"),
        ({"embeddings": False, "order": "natural", "damping": 0.1, "target": "weights"}, "lattice"),
        ({"formats": ("dense", "geoquant")}, "lattice"),
        ({"metric": "gradient", "method": "lattice"}, "lattice"),
        ({"grid": "lattice", "formats": ("gptq",)}, "lattice"),
        ({"grid": "lattice", "rate": 3.0, "formats": ("gptq",)}, "lattice"),
        ({"rate": 3.0, "formats": ("geoquant", "gptq")}, "lattice"),
        ({"bits": 4}, "box"),
        ({"group_size": 64}, "box"),
        ({"symmetric": True}, "box"),
        ({"keep": 0.01}, "box"),
        ({"static_scales": True}, "box"),
        ({"method": "rtn"}, "box"),
        ({"metric": "clipped"}, "box"),
        ({"formats": ("gguf",)}, "box"),
        ({"grid": "box"}, "box"),
    ],
)
def test_the_grid_is_the_lattice_unless_something_of_a_box_is_asked_for(given_, grid):
    recipe = checked({"model": "m", **given_})
    assert recipe.grid == grid
    assert recipe.method == given_.get("method", {"lattice": "lattice-priced", "box": "babai"}[grid])
    formats = {"lattice": ("geoquant",), "box": ("compressed-tensors",)}[grid]
    assert recipe.formats == given_.get("formats", formats)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        Recipe(model="m").bits = 3


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"bits": 9},
            "option bits: Input should be less than or equal to 8; got 9; "
            "choose a value of at least 2 and at most 8 (default 4)",
        ),
        (
            {"seed": -1},
            "option seed: Input should be greater than or equal to 0; got -1; choose a value of at least 0 (default 0)",
        ),
        (
            {"bits": "four"},
            "option bits: Input should be a valid integer, unable to parse string as an integer; got 'four'; "
            "choose a value of at least 2 and at most 8 (default 4)",
        ),
        (
            {"damping": 0.0},
            "option damping: Input should be greater than 0; got 0.0; "
            "choose a value of more than 0 and at most 1 (default automatic)",
        ),
        (
            {"window": 4},
            "option window: Input should be greater than or equal to 8; got 4; "
            "choose a value of at least 8 (default 512)",
        ),
        (
            {"symmetric": "perhaps"},
            "option symmetric: Input should be a valid boolean, unable to interpret input; got 'perhaps'; "
            "leave it out for the default, True",
        ),
        ({"model": 3}, "option model: Input should be a valid string; got 3; give a folder, a hub id or demo"),
        (
            {"sequential": "sites"},
            "unknown sequential 'sites'; wanted one of block, off, site; did you mean 'site'?",
        ),
        ({"moments": "int"}, "unknown moments 'int'; choose one of: float32, float64"),
        (
            {"formats": ("dense", "compresed")},
            "unknown format 'compresed'; wanted one of compressed-tensors, dense, geoquant, gguf, gptq, int4; "
            "did you mean 'compressed-tensors'?",
        ),
    ],
)
def test_the_first_violated_constraint_is_the_line(values, line):
    with pytest.raises(UserError) as caught:
        checked({"model": "m", **values})
    assert str(caught.value) == line


def test_an_option_that_does_not_exist_is_guessed():
    with pytest.raises(UserError, match=r"^unknown option 'bitz'; wanted one of aim, anchor, .*'bits'\?$"):
        checked({"model": "m", "bitz": 3})


def test_a_recipe_without_model_says_so():
    with pytest.raises(UserError, match=r"no model given; wanted MODEL, or model = \.\.\. in the recipe"):
        checked({})


def test_the_command_line_overrules_the_file(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('model = "base"\nbits = 3\ngroup_size = 32\n')
    assert load_recipe(file, bits=4) == Recipe(model="base", bits=4, group_size=32)


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "demo", "store"):
        (tmp_path / folder).mkdir()
    (tmp_path / "store" / "blob").write_text("a")
    (tmp_path / "model.gguf").symlink_to("store/blob")
    found = located(Recipe(model="model", reference="demo", calibration="store/../store/blob", members="nowhere.jsonl"))
    assert found == Recipe(
        model=f"{tmp_path}/model", reference="demo", calibration=f"{tmp_path}/store/blob", members="nowhere.jsonl"
    )
    assert located(found) == found
    assert located(Recipe(model="./demo")).model == f"{tmp_path}/demo"
    assert located(Recipe(model="owner/name")).model == "owner/name"
    # A link keeps its name, which says what it is.
    assert located(Recipe(model="model.gguf")).model == f"{tmp_path}/model.gguf"


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("bits = = 3\n")
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML: .*line 1"):
        load_recipe(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not valid TOML"):
        load_recipe(broken)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read the recipe .*: Is a directory; wanted a \.toml file"):
        load_recipe(tmp_path)


def test_a_number_without_end_is_no_bug(tmp_path):
    (tmp_path / "r.toml").write_text(f"bits = {'9' * 5000}\n")
    with pytest.raises(UserError, match=r"r\.toml is not valid TOML"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize(
    "values",
    [
        {"method": 3},
        {"formats": 3},
        {"formats": [["gguf"]]},
        {"rate": 3, "formats": ["gguf", ["gguf"]]},
        {"metric": ["plain"]},
    ],
)
def test_a_value_of_another_type_is_one_line(values):
    with pytest.raises(UserError):
        checked({"model": "m", **values})


@pytest.mark.parametrize("boxed", [{"bits": 4}, {"group_size": 64}, {"keep": 0.0}])
def test_a_rate_and_a_box_contradict_each_other_whatever_the_value(boxed):
    """One that equals the default was ignored without a word."""
    with pytest.raises(UserError, match="a rate belongs to the lattice"):
        checked({"model": "m", "rate": 3.0, **boxed})
    whole = checked({"model": "m", "rate": 3.0}).model_dump()  # a saved recipe has all options, and its grid
    assert checked(whole).grid == "lattice"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"grid": "lattice", "bits": 4},
            "bits belongs to the box; got grid = lattice, bits = 4; "
            "leave bits out (the size of a lattice is --rate), or use --grid box",
        ),
        ({"grid": "lattice", "group_size": 64, "rate": 3.0}, "group_size belongs to the box; got grid = lattice"),
        ({"grid": "lattice", "symmetric": True, "keep": 0.0}, "keep and symmetric belong to the box; got grid"),
        ({"grid": "lattice", "static_scales": False}, "static_scales belongs to the box"),
        (
            {"grid": "box", "rate": 3.25},
            "a box has bits, not a rate; got grid = box, rate = 3.25; use --grid lattice, or --bits",
        ),
        (
            {"method": "lattice", "bits": 4},
            "method lattice has no box; got bits = 4; leave bits out and use --grid lattice, or leave --method out",
        ),
        (
            {"method": "lattice", "formats": ("gptq",)},
            "method lattice has no box; got formats = ('gptq',); use --grid lattice, or leave --method out",
        ),
        ({"method": "lattice", "grid": "box"}, "method lattice has no box; got grid = box; use --grid lattice"),
        (
            {"rate": 3, "method": "rtn"},
            "method rtn needs a box; got grid = lattice; leave --method out, or use --grid box",
        ),
        (
            {"rate": 3, "metric": "plain"},
            "the lattice weighs sites against each other by their gradients; got --metric",
        ),
    ],
)
def test_what_a_grid_would_ignore_is_refused(values, line):
    with pytest.raises(UserError) as caught:
        checked({"model": "m", **values})
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("rate", "bits"), [(1.5, 2), (3, 3), (3.25, 3), (3.75, 4), (8.0, 8), (float("nan"), 8), ("3", 8)]
)
def test_a_rate_in_a_format_of_fixed_width_must_be_meant(rate, bits):
    with pytest.raises(UserError) as caught:
        checked({"model": "m", "rate": rate, "formats": ("gptq",)})
    assert str(caught.value) == (
        "a rate belongs to the lattice, whose codes do not fit into a box of few bits: gptq would hold them in 8; "
        f"got rate = {rate}, format = gptq; "
        f"for codes of {bits} bits in it use --bits {bits} and no rate, or add --grid lattice if 8 bits are meant"
    )


@pytest.mark.parametrize("asked", [{"rate": 3.0}, {"grid": "box"}, {"bits": 3, "keep": 0.1}, {}])
def test_what_a_run_wrote_down_names_everything_and_is_read_back(asked, tmp_path):
    recipe = checked({"model": "m", **asked})
    assert checked(recipe.model_dump(mode="json")) == recipe
    (tmp_path / "r.toml").write_text(recipe_toml(recipe))
    assert load_recipe(tmp_path / "r.toml") == recipe
    assert load_recipe(tmp_path / "r.toml", seed=3) == recipe.model_copy(update={"seed": 3})


def test_an_edited_file_and_a_flag_are_held_to_the_grid_too(tmp_path):
    written = recipe_toml(checked({"model": "m", "rate": 3.0}))
    (tmp_path / "r.toml").write_text(written)
    with pytest.raises(UserError, match="bits belongs to the box; got grid = lattice, bits = 4"):
        load_recipe(tmp_path / "r.toml", bits=4)
    (tmp_path / "r.toml").write_text(written.replace("bits = 4", "bits = 3"))
    with pytest.raises(UserError, match="bits belongs to the box; got grid = lattice, bits = 3"):
        load_recipe(tmp_path / "r.toml")


def test_a_contradiction_is_told_before_torch_is_there():
    code = (
        "import sys\nfrom geoquant import cli\n"
        "assert cli.run(['quantize', 'm', '--out', 'r', '--method', 'lattice', '--bits', '4']) == 2\n"
        "sys.exit('torch' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stderr.startswith("geoquant: error: method lattice has no box; got bits = 4; leave bits out")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"bits": 4, "embeddings": False}, "--no-embeddings serves --grid lattice; got grid = box; leave --no-emb"),
        ({"bits": 4, "foldable": True}, "--foldable serves --grid lattice"),
        ({"bits": 4, "row_block": 64}, "--row-block serves --grid lattice"),
        ({"metric": "plain", "gradient_share": 0.25}, "--gradient-share serves --metric gradient; got metric = plain"),
        (
            {"target": "weights", "reference_share": 0.5},
            "--reference-share serves --target outputs with --sequential site; got target = weights, sequential = site",
        ),
        ({"method": "rtn", "order": "natural"}, "--order serves methods that make up"),
    ],
)
def test_a_flag_that_nothing_reads_is_refused_even_with_its_default(flags, line, tmp_path):
    with pytest.raises(UserError, match=re.escape(line)):
        RecipeFlags(**flags).recipe("m", None)
    # Not in a file: one that was written down whole names every option.
    (tmp_path / "r.toml").write_text(recipe_toml(checked({"model": "m", **flags})))
    assert RecipeFlags().recipe(None, tmp_path / "r.toml") == checked({"model": "m", **flags})


def test_flags_that_something_reads_are_let_in():
    lattice = {"embeddings": False, "foldable": False, "row_block": 8, "gradient_share": 0.5, "reference_share": 0.5}
    for flags in (lattice, {"method": "babai", "order": "natural"}, {"bits": 3, "gradient_share": 0.1}):
        assert RecipeFlags(**flags).recipe("m", None) == checked({"model": "m", **flags})
