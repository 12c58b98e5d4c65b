"""Compiled functions where numba has no place for its cache, and models of others where our reader cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from transformers.quantizers import auto

import geoquant
from geoquant import _hook
from geoquant.errors import UserError
from geoquant.lattice import kernel


def test_without_a_place_for_a_cache_functions_are_compiled_anew(tmp_path):
    package = tmp_path / "geoquant"
    shutil.copytree(Path(geoquant.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [package, *package.rglob("*")]:
        if folder.is_dir():
            (folder / "__pycache__").write_text("")
    nowhere = {"HOME": "/proc/nope", "XDG_CACHE_HOME": "/proc/nope", "PYTHONPATH": str(tmp_path)}
    settings = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | nowhere
    code = (
        "import numpy as np; from geoquant.lattice import kernel; one = np.float32(1.0)\n"
        "print(kernel.__file__, kernel._cheaper(one, one, one, np.full((1, 3), 9, np.float32), 0))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert child.stdout.split() == [str(package / "lattice" / "kernel.py"), "0.0"], child.stderr


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


@pytest.mark.parametrize("call", [kernel._cheaper, kernel._cheaper.py_func])
def test_a_code_that_is_no_index_has_the_price_of_the_largest(call):
    """Such codes read memory that is not the table's."""
    one, saved = np.float32(1.0), np.array([[9, 9, 5]], dtype=np.float32)
    for number in (np.nan, np.inf, -np.inf, 2.0**63, -(2.0**63), 1e30):
        code = np.float32(number)
        assert np.array_equal(call(code, code, one, saved, 0), code, equal_nan=True)
    assert call(one, one, one, saved, 0) == 0.0
    for cost, found in ((4.9, 6.0), (5.1, 7.0)):
        assert call(np.float32(7.0), np.float32(7.0), np.float32(cost), saved, 0) == found
