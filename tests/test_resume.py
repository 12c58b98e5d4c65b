"""Runs that die: kill -9 at chosen moments, Ctrl-C, a full disk; and what `--resume` makes of them.

A real process is killed each time. To spare five seconds of imports a time, one interpreter that has imported
everything and computed nothing (so it has no threads yet) forks a child for every command.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from conftest import make_tokenizer, tiny_llama
from geoquant import cli, runs
from geoquant.data.text import builtin_text
from geoquant.export import weights as export_weights
from geoquant.plan import estimate

BLOCKS, STAGES = 6, 24

NURSERY = """
import json, os, pathlib, signal, sys, time

import torch
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import geoquant.pipeline
from geoquant import cli
from geoquant.plan import estimate

torch.set_num_threads(1)
estimate.gemm_rate = lambda *_: 1e10
rename = pathlib.Path.replace

def slowly(pause):
    def replace(self, target):
        time.sleep(pause)
        rename(self, target)
        time.sleep(pause)
    return replace

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            pathlib.Path.replace = slowly(request["pause"])
            code = cli.run(request["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Runs `geoquant` commands, each in a process of its own that can be killed."""

    def __init__(self, place: Path):
        self.log = place / "log.txt"
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **quiet},
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *arguments: str, pause: float = 0.0) -> int:
        """Begin a command; returns its process id. Every file appears slowly: `pause` seconds before and after."""
        request = {"arguments": list(arguments), "log": str(self.log), "pause": pause}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Exit code of the command that was started; minus the signal that ended it."""
        return int(self.process.stdout.readline())

    def run(self, *arguments: str) -> tuple[int, str]:
        """Play a command to its end: exit code and everything it printed."""
        self.start(*arguments)
        return self.wait(), self.log.read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    found = Nursery(tmp_path_factory.mktemp("nursery"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, str]:
    """What every run is asked for: a model of six blocks, so that there is time to die."""
    place = tmp_path_factory.mktemp("deep")
    tiny_llama(num_hidden_layers=BLOCKS).save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    text = builtin_text()
    (place / "calibration.txt").write_text(text[:4000])
    (place / "evaluation.txt").write_text(text[4000:5000])
    return {
        "MODEL": str(place / "model"),
        "--calibration": str(place / "calibration.txt"),
        "--text": str(place / "evaluation.txt"),
        "--windows": "8",
        "--window": "32",
        "--evaluation-windows": "2",
        "--group-size": "16",
        "--method": "dqc",
        "--keep": "0.05",
    }


def arguments(options: dict[str, str]) -> list[str]:
    """The options as they stand on a command line."""
    rest = [word for name, value in options.items() if name != "MODEL" for word in (name, value)]
    return [options["MODEL"], *rest, "--no-verify"]


@pytest.fixture(scope="module")
def flags(options) -> list[str]:
    return arguments(options)


@pytest.fixture(scope="module")
def rounding(options) -> list[str]:
    """The same run by rounding: for tests that are not about its numbers."""
    return arguments(options | {"--method": "rtn", "--keep": "0", "--metric": "plain"})


@pytest.fixture(scope="module")
def whole(nursery, flags, tmp_path_factory) -> Path:
    """The run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, log = nursery.run("quantize", *flags, "--out", str(run))
    assert code == 0, log
    return run


def site_file(path: Path) -> tuple[dict[str, bytes], dict]:
    """Every tensor's bytes, and the metadata but the time it took."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {name: value for name, value in file.metadata().items() if name != "seconds"}
    return {
        name: bytes(str(t.dtype), "ascii") + t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, t in tensors.items()
    }, metadata


def same_sites(run: Path, whole: Path) -> int:
    """Hold every finished site of `run` against the uninterrupted run; returns how many there are."""
    paths = [path for path in (run / "sites").glob("*") if not path.name.startswith(".partial-")]
    for path in paths:
        assert site_file(path) == site_file(whole / "sites" / path.name), path.name
    return len(paths)


def same_run(run: Path, whole: Path) -> None:
    """Hold a finished run against the uninterrupted one, bit by bit."""
    assert same_sites(run, whole) == STAGES
    for folder in ("model", "adapter"):
        names = sorted(path.name for path in (whole / folder).iterdir())
        assert sorted(path.name for path in (run / folder).iterdir()) == names
        for name in names:
            assert runs.file_hash(run / folder / name) == runs.file_hash(whole / folder / name), name
    for name in ("original.json", "quantized.json", "plan.json", "expected.safetensors", "token_weights.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, whole)]
    for report in reports:
        for passing in ("created", "command", "timings", "peak_memory_bytes", "solver"):
            del report[passing]
        for export in report["exports"]:
            del export["snippet"]  # names the folder
    assert reports[0] == reports[1]
    assert (run / "report.html").exists()
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"
    assert not list(run.rglob(".partial-*"))
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in whole.iterdir())


def until(condition: Callable[[], bool], run: Path) -> bool:
    """Wait for something in the run folder; False when the run reported first."""
    deadline = time.monotonic() + 120
    while not condition():
        done = (run / "manifest.json").exists() and '"status": "done"' in (run / "manifest.json").read_text()
        if done:
            return False
        assert time.monotonic() < deadline, sorted(str(path) for path in run.rglob("*"))
        time.sleep(0.001)
    return True


def solved(run: Path) -> int:
    return len(list((run / "sites").glob("model*")))


def exporting(run: Path) -> bool:
    return any(any(path.iterdir()) for path in run.glob(".partial-model-*"))


# Moments to die at, in the order of a run.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the manifest is written": lambda run: (run / "manifest.json").exists(),
    "a site is half written": lambda run: any((run / "sites").glob(".partial-*")),
    "the first site is done": lambda run: solved(run) >= 1,
    "half the sites are done": lambda run: solved(run) >= STAGES // 2,
    "all sites are done": lambda run: solved(run) == STAGES,
    "an export is half written": exporting,
}


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(nursery, flags, whole, tmp_path):
    run = tmp_path / "run"
    before = 0
    for number, (name, moment) in enumerate(MOMENTS.items()):
        resume = ["--resume"] if number else []
        child = nursery.start("quantize", *flags, "--out", str(run), *resume, pause=0.03)
        assert until(lambda moment=moment: moment(run), run), f"the run ended before {name}"
        os.kill(child, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL
        assert json.loads((run / "manifest.json").read_text())["status"] == "running"
        assert not (run / "model").exists(), f"half a model appeared when {name}"
        now = same_sites(run, whole)
        assert now >= before
        before = now
    assert before == STAGES
    # The folder alone says what is wanted.
    code, log = nursery.run("quantize", "--out", str(run), "--resume")
    assert code == 0, log
    same_run(run, whole)


def test_ctrl_c_leaves_a_run_that_goes_on(nursery, flags, whole, tmp_path):
    run = tmp_path / "run"
    child = nursery.start("quantize", *flags, "--out", str(run), pause=0.02)
    assert until(lambda: solved(run) >= 3, run)
    os.kill(child, signal.SIGINT)
    assert nursery.wait() == 130
    last = nursery.log.read_text().splitlines()[-1]
    assert last == "geoquant: interrupted; finished sites are kept: add --resume to the same command to go on"
    assert not list(run.rglob(".partial-*"))
    assert 3 <= same_sites(run, whole) < STAGES
    code, log = nursery.run("quantize", *flags, "--out", str(run), "--resume")
    assert code == 0, log
    same_run(run, whole)


def test_resuming_a_finished_run_changes_nothing(nursery, flags, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    code, log = nursery.run("quantize", *flags, "--out", str(run), "--resume")
    assert code == 0, log
    same_run(run, whole)


# --- a run of something else --------------------------------------------------------------------------------


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """A run that was stopped halfway."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("model", "adapter", "report.*", "quantized.json"))
    for path in sorted((run / "sites").iterdir())[::2]:
        path.unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    return run


def refused(asked: list[str], run: Path, capsys) -> str:
    """The one line with which a resume is refused; nothing in the folder may change."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.run(["quantize", *asked, "--out", str(run), "--resume"]) == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    return line


def test_other_options_are_refused(stopped, flags, capsys):
    line = refused([*flags, "--bits", "3"], stopped, capsys)
    assert "was started with bits = 4; got 3; resume with the same options, or choose a new folder" in line
    # Also where the folder says the rest.
    assert "was started with seed = 0; got 7" in refused(["--seed", "7"], stopped, capsys)


def test_what_decides_no_number_may_differ(stopped, flags, capsys, monkeypatch):
    from geoquant import exporting

    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    monkeypatch.setattr(exporting, "verify", lambda *_: pytest.fail("was told not to"))
    manifest = json.loads((stopped / "manifest.json").read_text())
    manifest["recipe"]["verify"] = True
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    assert cli.run(["quantize", "--out", str(stopped), "--resume", "--no-verify", "--format", "dense"]) == 0
    assert [path.name for path in stopped.iterdir() if path.name in ("model", "dense")] == ["dense"]
    for name in ("manifest.json", "report.json"):
        recipe = json.loads((stopped / name).read_text())["recipe"]
        assert (recipe["verify"], recipe["formats"]) == (False, ["dense"])
    assert json.loads((stopped / "report.json").read_text())["warnings"] == []


def test_other_versions_are_warned_of_for_good(stopped, flags, capsys, monkeypatch):
    from geoquant import pipeline

    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    manifest = json.loads((stopped / "manifest.json").read_text())
    now = manifest["versions"]["torch"]
    manifest["versions"] |= {"torch": "1.0", "numpy": "1.0"}
    (stopped / "manifest.json").write_text(json.dumps(manifest))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "measure_quantized", interrupted)
        assert cli.run(["quantize", *flags, "--out", str(stopped), "--resume"]) == 130
    warning = f"resumed under other versions (torch 1.0 -> {now}): not bit for bit what one version would have given"
    assert warning in capsys.readouterr().err
    # Back to the first version: half of the sites are of the other one all the same.
    kept = json.loads((stopped / "manifest.json").read_text())
    (stopped / "manifest.json").write_text(json.dumps(kept | {"versions": kept["versions"] | {"torch": now}}))
    assert cli.run(["quantize", *flags, "--out", str(stopped), "--resume"]) == 0
    assert warning in json.loads((stopped / "report.json").read_text())["warnings"]


def test_a_run_goes_on_from_another_folder(options, tmp_path, capsys, monkeypatch):
    from geoquant import pipeline

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "measure_original", interrupted)
    place, run = Path(options["MODEL"]).parent, tmp_path / "run"
    monkeypatch.chdir(place)
    relative = {name: value.removeprefix(f"{place}/") for name, value in options.items()}
    assert relative["MODEL"] == "model"
    assert cli.run(["quantize", *arguments(relative), "--out", str(run)]) == 130
    recipe = json.loads((run / "manifest.json").read_text())["recipe"]
    assert recipe["model"] == options["MODEL"]
    assert recipe["calibration"] == options["--calibration"]
    # Whether the folder says where the inputs are or the command does: it is one run.
    monkeypatch.chdir(tmp_path)
    for asked in ([], arguments(options)):
        assert cli.run(["quantize", *asked, "--out", str(run), "--resume"]) == 130
    # A manifest that kept paths as they were typed serves from the folder they were typed in.
    for name in ("model", "calibration", "evaluation"):
        moved(run, name, Path(recipe[name]).relative_to(place))
    assert "was started with model = 'model'" in refused(arguments(options), run, capsys)
    monkeypatch.chdir(place)
    for asked in ([], arguments(options)):
        assert cli.run(["quantize", *asked, "--out", str(run), "--resume"]) == 130


def moved(run: Path, option: str, path: Path) -> None:
    """Let the run's manifest name another path: an input that changed in its place."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"][option] = str(path)
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_another_model_in_the_same_place_is_refused(stopped, options, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(options["MODEL"], model)
    tiny_llama(seed=1, num_hidden_layers=BLOCKS).save_pretrained(model)
    moved(stopped, "model", model)
    line = refused(arguments(options | {"MODEL": str(model)}), stopped, capsys)
    assert "the model changed since the run in" in line


@pytest.mark.parametrize(("flag", "name"), [("--calibration", "calibration"), ("--text", "evaluation")])
def test_other_texts_are_refused(flag, name, stopped, options, tmp_path, capsys):
    text = tmp_path / "text.txt"
    # Beyond the windows that are read, but not the same text.
    text.write_text(Path(options[flag]).read_text()[:-1] + "?")
    moved(stopped, name, text)
    line = refused(arguments(options | {flag: str(text)}), stopped, capsys)
    assert f"the {name} changed since" in line


def test_another_base_and_other_records_are_refused_though_the_base_was_scored(rounding, tmp_path, capsys, monkeypatch):
    from geoquant import pipeline
    from geoquant.data.private import make_records
    from geoquant.data.records import write_records

    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    pool, run = make_records(21, seed=1), tmp_path / "run"
    write_records(tmp_path / "members.jsonl", pool[:10])
    write_records(tmp_path / "others.jsonl", pool[10:20])
    sides = ["--members", str(tmp_path / "members.jsonl"), "--nonmembers", str(tmp_path / "others.jsonl")]
    shutil.copytree(rounding[0], tmp_path / "base")
    asked = [*rounding, *sides, "--reference", str(tmp_path / "base")]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "measure_original", interrupted)
        assert cli.run(["quantize", *asked, "--out", str(run)]) == 130
    assert (run / "base_scores.safetensors").exists()
    tiny_llama(seed=1, num_hidden_layers=BLOCKS).save_pretrained(tmp_path / "base")
    assert "the reference changed since the run in" in refused(asked, run, capsys)
    write_records(tmp_path / "members.jsonl", pool[1:10] + pool[20:])
    assert "the records changed since the run in" in refused(asked, run, capsys)


def test_a_damaged_site_is_named_and_solved_again_once_removed(stopped, nursery, flags, whole, capsys):
    path = stopped / "sites" / "model.layers.0.self_attn.q_proj.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    line = refused(flags, stopped, capsys)
    assert str(path) in line
    assert "delete it and run the same command again (quantize: with --resume)" in line
    path.unlink()
    code, log = nursery.run("quantize", *flags, "--out", str(stopped), "--resume")
    assert code == 0, log
    same_run(stopped, whole)


# --- a full disk --------------------------------------------------------------------------------------------


def full_disk(place: str, count: int, error: Exception):
    """A `save_file` that fails on its `count`-th file of a folder of that name, with half of it written."""
    from safetensors.torch import save_file

    left = [count]

    def save(tensors, path, metadata=None):
        if Path(path).parents[1].name.startswith(place):  # the file's own temporary folder lies in between
            left[0] -= 1
            if left[0] == 0:
                Path(path).write_bytes(b"half")
                raise error
        save_file(tensors, path, metadata=metadata)

    return save


FULL = {
    "sites": ("sites", 5, OSError(errno.ENOSPC, "No space left on device")),
    "sites, as safetensors says it": (
        "sites",
        5,
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ),
    "export": (".partial-model-", 1, OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(case, rounding, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    run, (place, count, error) = tmp_path / "run", FULL[case]
    save = full_disk(place, count, error)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_file", save)
        patch.setattr(export_weights, "save_file", save)
        assert cli.run(["quantize", *rounding, "--out", str(run)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert "disk full while writing" in line
    assert "free some space, then run the same command again (quantize: with --resume)" in line
    assert ".partial-" not in line
    assert (f"while writing {run / 'model'};" in line) == (place != "sites")
    assert not list(run.rglob(".partial-*"))
    assert solved(run) == (4 if place == "sites" else STAGES)
    assert not (run / "model").exists()
    assert cli.run(["quantize", *rounding, "--out", str(run), "--resume"]) == 0
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"
    assert solved(run) == STAGES


def test_a_full_disk_under_the_tokenizer_is_one_line_too(rounding, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
    from transformers import PreTrainedTokenizerFast

    def save(*_, **__):
        raise Exception("No space left on device (os error 28)")  # word for word what /dev/full brings out of it

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    assert cli.run(["quantize", *rounding, "--out", str(tmp_path / "run")]) == 2
    assert "disk full while writing" in capsys.readouterr().err
