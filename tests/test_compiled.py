"""Compiled functions where numba has no place for its cache, and models of others where our reader cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.quantizers import auto

import geoquant
from geoquant import _hook
from geoquant.errors import UserError
from geoquant.lattice import lanes


def test_without_a_place_for_a_cache_functions_are_compiled_anew(tmp_path):
    package = tmp_path / "geoquant"
    shutil.copytree(Path(geoquant.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [package, *package.rglob("*")]:
        if folder.is_dir():
            (folder / "__pycache__").write_text("")
    nowhere = {"HOME": "/proc/nope", "XDG_CACHE_HOME": "/proc/nope", "PYTHONPATH": str(tmp_path)}
    settings = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | nowhere
    code = (
        "import numpy as np; from geoquant.lattice import lanes; some = np.arange(lanes.LANES)\n"
        "codes, ones = np.zeros((lanes.LANES, 1), np.int8), np.ones((1, lanes.LANES), np.float32)\n"
        "lanes.unpack(ones, some, np.zeros(1, np.int64), codes, 0, lanes.LANES)\n"
        "print(lanes.__file__, codes.mean())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert child.stdout.split() == [str(package / "lattice" / "lanes.py"), "1.0"], child.stderr


def test_a_reader_that_cannot_be_imported_stops_nobody_but_its_own_files(tiny_model_dir, monkeypatch):
    def broken(name: str) -> None:
        raise RuntimeError("no locator\navailable")

    for mapping in _hook.mappings():
        monkeypatch.setitem(mapping, _hook.METHOD, None)  # put back afterwards
    with monkeypatch.context() as patch:
        patch.setattr(_hook, "import_module", broken)
        _hook.register()
        assert transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir) is not None
        config = transformers.AutoConfig.from_pretrained(tiny_model_dir)
        config.quantization_config = {"quant_method": "geoquant"}
        with pytest.raises(UserError, match=r"cannot be imported \(RuntimeError: no locator available\)"):
            transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir, config=config)
    _hook.withdraw()
    assert not any(_hook.METHOD in mapping for mapping in _hook.mappings())


def test_a_reader_that_failed_for_a_circle_of_imports_is_found_later():
    code = (
        "import sys, types; sys.modules['geoquant.lattice.unboxed'] = types.ModuleType('half')\n"
        "import geoquant; from transformers.quantizers import auto; stub = auto.AUTO_QUANTIZER_MAPPING['geoquant']\n"
        "del sys.modules['geoquant.lattice.unboxed']\n"
        "found = auto.AutoQuantizationConfig.from_dict({'quant_method': 'geoquant'})\n"
        "print(stub.__name__, type(found).__name__, auto.AUTO_QUANTIZER_MAPPING['geoquant'].__name__)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.split() == ["_Absent", "GeoQuantConfig", "GeoQuantizer"], child.stderr


def test_here_the_reader_is_registered():
    assert auto.AUTO_QUANTIZER_MAPPING["geoquant"].__module__ == _hook.READER


def rounded(numbers, pull=None):
    """Codes of one column of rows that know nothing of each other, at a step of one, and the errors they leave."""
    slots = lanes.LANES * -(-len(numbers) // lanes.LANES)
    values = np.resize(np.array(numbers, np.float32), slots)
    codes, errors, one = values[None].copy(), values[None].copy(), np.ones(1, np.float32)
    pulls = (None, None) if pull is None else (np.full(slots, pull, np.float32), one)
    lanes.panel(codes, errors, one, np.zeros((1, 1), np.float32), None, 0, slots, *pulls)
    return codes[0, : len(numbers)], errors[0, : len(numbers)]


def test_what_is_no_integer_is_drawn_to_none():
    numbers = [np.nan, np.inf, -np.inf, 2.0**63, -(2.0**63), 1e30, -1e30, 2.0**31]
    for pull in (None, 0.3):
        np.testing.assert_array_equal(rounded(numbers, pull)[0], np.array(numbers, np.float32))
    np.testing.assert_array_equal(rounded([1.0, -1.0, 0.0, 9.0, -9.0], 1.5)[0], [0.0, 0.0, 0.0, 8.0, -8.0])


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=40),
    pull=st.none() | st.floats(0, 10, width=32),
)
def test_a_centre_is_drawn_towards_zero_by_its_share_and_one_step_at_most(numbers, pull):
    codes, errors = rounded(numbers, pull)
    for value, code, error in zip(np.float32(numbers), codes, errors):
        exact = np.float64(value) / (1 + np.float64(pull or 0))
        exact = min(max(exact, value - 1.0), value + 1.0)
        assert abs(code - exact) <= 0.5 + 1e-5
        assert code == round(code)
        assert error == value - code


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32])
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (5, 16), (40, 50)])
def test_what_is_packed_is_unpacked(kind, out, columns):
    """In any slots and on any lines; numbers beyond an integer become its least."""
    rng, slots = np.random.default_rng(0), 3 * lanes.LANES
    rows, places = np.full(slots, -1), rng.permutation(columns)
    rows[rng.permutation(slots)[:out]] = rng.permutation(out)
    values, steps = rng.integers(-99, 99, (out, columns)).astype(np.float32), 2.0 ** rng.integers(-3, 4, out)
    work, codes = np.full((columns, slots), np.nan, np.float32), np.zeros((out, columns), kind)
    lanes.pack(values * steps[:, None].astype(np.float32), steps.astype(np.float32), rows, places, work, 0, slots)
    assert not work[:, rows < 0].any()
    lanes.unpack(work, rows, places, codes, 0, slots)
    np.testing.assert_array_equal(codes, values)
    if kind == np.int32:
        work[:] = rng.choice([np.nan, 2.0**31, -(2.0**40), np.inf], work.shape)
        lanes.unpack(work, rows, places, codes, 0, slots)
        assert (codes == -(2**31)).all()


def test_lanes_are_of_floats_without_gaps():
    """A vector is read from where the array says its numbers are, whatever they are."""
    doubles, floats, some = np.zeros((1, lanes.LANES)), np.zeros((1, lanes.LANES), np.float32), np.arange(lanes.LANES)
    with pytest.raises(numba.TypingError, match="lanes are of float32 without gaps"):
        lanes.pack(doubles, floats[0], 0 * some, some, floats, 0, lanes.LANES)
