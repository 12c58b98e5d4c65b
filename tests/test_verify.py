"""`verify` passes what is right, fails what is wrong, and explains what cannot be loaded.

One test starts the real fresh process; the others run the reader's `main` here, which saves its imports.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_tokenizer
from export_cases import probe, small_llama, solve
from geoquant.errors import UserError
from geoquant.export import _reader
from geoquant.export import verify as module
from geoquant.export.adapter import export_adapter
from geoquant.export.compressed_tensors import export_compressed_tensors
from geoquant.export.dense import export_dense
from geoquant.export.verify import verify, write_expected
from geoquant.lattice.grid import Grid


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with model, adapter, dense and expected.safetensors. Read only."""
    folder = tmp_path_factory.mktemp("run")
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32), lambda name, columns: [3, 11])
    write_expected(folder / "expected.safetensors", model, probe())
    export_compressed_tensors(model, make_tokenizer(), solutions, folder / "model")
    export_adapter(solutions, folder / "adapter")
    export_dense(model, make_tokenizer(), folder / "dense", dtype=torch.bfloat16)
    return folder


def test_expected_holds_at_most_64_positions(tmp_path):
    model = small_llama()
    write_expected(tmp_path / "e.safetensors", model, torch.randint(3, 200, (5, 20)))
    stored = load_file(tmp_path / "e.safetensors")
    assert stored["tokens"].shape == (3, 20)
    assert stored["logits"].shape == (3, 20, 304)
    assert stored["logits"].dtype == torch.float32
    write_expected(tmp_path / "e.safetensors", model, torch.randint(3, 200, (2, 100)))
    assert load_file(tmp_path / "e.safetensors")["tokens"].shape == (1, 64)


def test_model_and_adapter_reproduce_the_solved_logits(run):
    result = verify(run / "model", run / "expected.safetensors", run / "adapter")
    assert result.ok
    assert result.independent  # no geoquant module in the reader's process
    assert result.max_rel < 1e-5
    assert result.tolerance == 1e-3
    assert set(result.versions) == {"torch", "transformers", "compressed-tensors", "peft", "safetensors"}
    assert all(result.versions.values())
    assert result.seconds > 0


@pytest.fixture
def in_process(monkeypatch):
    """Let `verify` call the reader in this process (where geoquant is imported, of course)."""

    def read(folder, expected, adapter, dtype, imports):
        task = {"folder": str(folder), "expected": str(expected), "adapter": adapter and str(adapter)}
        return _reader.main(task | {"dtype": dtype, "paths": [], "imports": [*imports]}) | {"independent": True}

    monkeypatch.setattr(module, "read_elsewhere", read)


def test_a_missing_adapter_is_noticed(run, in_process):
    result = verify(run / "model", run / "expected.safetensors")
    assert not result.ok
    assert result.max_rel > 0.1
    assert "peft" not in result.versions


def test_dense_bfloat16_passes_its_own_tolerance_only(run, in_process):
    result = verify(run / "dense", run / "expected.safetensors")
    assert result.ok
    assert 1e-4 < result.max_rel < result.tolerance == 0.5
    assert 3 < result.max_rel / result.rms_rel < 7  # as normal numbers are
    assert not judged(run, result, tolerance=1e-4).ok


def judged(run, result, **options):
    """The verdict on an outcome already at hand: no second process."""
    outcome = {
        "max_abs_diff": result.max_abs_diff,
        "rms_diff": result.max_abs_diff * result.rms_rel / result.max_rel,
        "spread": result.max_abs_diff / result.max_rel,
        "independent": result.independent,
        "versions": result.versions,
        "seconds": 1.0,
    } | options.pop("outcome", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_elsewhere", lambda *_, **__: outcome)
        return verify(run / "dense", run / "expected.safetensors", **options)


def test_one_wrong_code_is_noticed(run, tmp_path, in_process):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (run / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_packed"][0, 0] ^= 0x8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = verify(folder, run / "expected.safetensors", run / "adapter")
    assert not result.ok


def test_a_missing_tensor_is_one_line_that_names_it_and_the_reader(run, tmp_path, in_process):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (run / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        verify(folder, run / "expected.safetensors")
    assert "cannot load" in str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight_scale" in str(caught.value)
    assert "transformers 5." in str(caught.value)
    assert "\n" not in str(caught.value)


def outcome_of(monkeypatch, script: str, tmp_path):
    """Run `read_elsewhere` with another child program."""
    child = tmp_path / "export" / "_reader.py"
    child.parent.mkdir()
    child.write_text(script)
    monkeypatch.setattr(module, "__file__", str(child.with_name("verify.py")))
    return module.read_elsewhere(tmp_path, tmp_path / "expected", None, "float32")


def test_a_killed_reader_is_explained(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"killed by signal 9.*memory ran out"):
        outcome_of(monkeypatch, "import os; os.kill(os.getpid(), 9)", tmp_path)


def test_a_crashed_reader_shows_its_last_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="failed: SystemError: broken; got exit 1"):
        outcome_of(monkeypatch, "raise SystemError('broken')", tmp_path)


def test_chatter_before_the_outcome_is_skipped_and_the_task_arrives(monkeypatch, tmp_path):
    answer = "{'task': json.loads(sys.argv[1]), 'flags': sys.flags.isolated}"
    script = f"import json, sys; print('hello'); print(json.dumps({answer}))"
    outcome = outcome_of(monkeypatch, script, tmp_path)
    assert outcome["flags"] == 1
    assert outcome["task"]["dtype"] == "float32"


def test_nan_and_a_dependent_reader_are_never_ok(run):
    base = module.VerifyResult(1e-9, 1e-9, 1e-9, 1e-3, True, True, {}, 1.0)
    assert judged(run, base).ok
    assert not judged(run, base, outcome={"max_abs_diff": float("nan")}).ok
    assert not judged(run, base, outcome={"independent": False}).ok
    assert not judged(run, base, outcome={"rms_diff": float("nan")}).ok
    assert judged(run, base, outcome={"spread": 0.0, "max_abs_diff": 0.0, "rms_diff": 0.0}).ok
    assert not judged(run, base, outcome={"spread": 0.0, "max_abs_diff": 1e-9}).ok


def test_many_small_differences_are_not_roundings(run):
    """No logit is far off, but all are off: a wrong tensor."""
    base = module.VerifyResult(1e-9, 1e-9, 1e-9, 1e-3, True, True, {}, 1.0)
    far = {"spread": 1.0, "max_abs_diff": 0.4}
    assert judged(run, base, outcome=far | {"rms_diff": 0.09}).ok
    assert not judged(run, base, outcome=far | {"rms_diff": 0.11}).ok


def test_missing_expected_file(run, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*expected\.safetensors"):
        verify(run / "model", tmp_path / "expected.safetensors")


def test_outcome_is_json_even_when_the_reader_raises(tmp_path):
    """The child's own entry point, in this process: an unreadable folder is an outcome, not a traceback."""
    save_file({"tokens": probe(), "logits": torch.zeros(1, 40, 304)}, tmp_path / "e.safetensors")
    (tmp_path / "config.json").write_text("{}")
    task = {"folder": str(tmp_path), "expected": str(tmp_path / "e.safetensors"), "adapter": None}
    outcome = json.loads(json.dumps(_reader.main(task | {"dtype": "float32", "paths": [], "imports": []})))
    assert outcome["error"].startswith("ValueError: ")
    assert outcome["independent"] is False  # this process has imported geoquant: the flag can say no
