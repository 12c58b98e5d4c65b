"""The run folder: a file that exists is whole, whatever happened while it was written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from geoquant import runs
from geoquant.errors import UserError
from geoquant.runs import (
    PARTIAL,
    atomic_directory,
    atomic_write,
    claim_output,
    file_hash,
    read_json,
    read_tensors,
    remove_empty,
    write_json,
    write_tensors,
)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(PARTIAL)]


def test_json_and_tensors_come_back_as_they_went(tmp_path):
    value = {"a": [1, 2.5, None], "ü": "ß"}
    write_json(tmp_path / "deep" / "x.json", value)
    assert read_json(tmp_path / "deep" / "x.json") == value
    # A transposed view: safetensors alone would refuse it.
    tensors = {"w": torch.arange(6.0).view(2, 3).T, "codes": torch.tensor([-8, 7], dtype=torch.int8)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    back, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert leftovers(tmp_path) == []
    assert os.stat(tmp_path / "x.safetensors").st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, {"old": 1})

    def half(partial):
        partial.write_text('{"new":')
        raise RuntimeError("the writer failed")

    with pytest.raises(RuntimeError):
        atomic_write(target, half)
    assert read_json(target) == {"old": 1}
    assert leftovers(tmp_path) == []


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full while writing .*x.bin; .*--resume"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full while writing .*x.bin"),
        (OSError(errno.EFBIG, "File too large"), "cannot write .*x.bin: File too large"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write .*x.bin: Read-only file system"),
        (
            SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'),
            "disk full while writing .*x.bin",
        ),
    ],
)
def test_a_full_or_closed_disk_is_one_line(tmp_path, error, line):
    def fails(partial):
        raise error

    with pytest.raises(UserError, match=line):
        atomic_write(tmp_path / "x.bin", fails)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_inside_a_folder_names_the_folder_to_be(tmp_path, error):
    def fails(partial):
        raise error

    def build():
        with atomic_directory(tmp_path / "model") as folder:
            atomic_write(folder / "shard-00001", fails)

    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value) == (
        f"disk full while writing {tmp_path / 'model'}; "
        "free some space, then run the same command again (quantize: with --resume)"
    )
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_dressed_up(tmp_path):
    def fails(partial):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        atomic_write(tmp_path / "x.bin", fails)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one megabyte, where this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("cannot mount a tiny disk here")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tiny disk here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_really_full_disk(tiny_disk):
    write_json(tiny_disk / "old.json", {"kept": True})
    for write in (
        lambda: write_tensors(tiny_disk / "big.safetensors", {"w": torch.zeros(1 << 20)}),
        lambda: write_json(tiny_disk / "big.json", {"w": "x" * (2 << 20)}),
    ):
        with pytest.raises(UserError, match=r"disk full while writing .*big"):
            write()
    assert [path.name for path in tiny_disk.iterdir()] == ["old.json"]
    assert read_json(tiny_disk / "old.json") == {"kept": True}


WRITER = """
import sys
from pathlib import Path
import torch
from geoquant.runs import write_json, write_tensors
folder = Path(sys.argv[1])
print("go", flush=True)
for step in range(1_000_000):
    write_json(folder / "x.json", {"step": step, "filling": ["x" * 1000] * 100, "end": step})
    write_tensors(folder / "x.safetensors", {"w": torch.full((100_000,), step % 1000)})
"""


def test_files_are_whole_after_a_kill(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"go\n"
    deadline = time.monotonic() + 30
    while not (tmp_path / "x.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    value = read_json(tmp_path / "x.json")
    assert value["step"] == value["end"]
    tensor = read_tensors(tmp_path / "x.safetensors")[0]["w"]
    assert len(tensor) == 100_000
    assert (tensor == tensor[0]).all()
    # The next run sweeps what the killed one left.
    write_json(tmp_path / "manifest.json", {})
    claim_output(tmp_path, resume=True)
    assert leftovers(tmp_path) == []


def test_a_folder_replaces_the_old_one_only_when_it_is_whole(tmp_path):
    target = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_directory(target) as partial:
            (partial / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["second"]

    def fail_inside():
        with atomic_directory(target) as partial:
            (partial / "third").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert [path.name for path in target.iterdir()] == ["second"]
    assert leftovers(tmp_path) == []


def test_output_rules(tmp_path):
    new = tmp_path / "a" / "run"
    claim_output(new, resume=False)
    assert new.is_dir()
    claim_output(new, resume=False)  # empty: still free
    (new / f"{PARTIAL}abc").write_text("left by a kill before the manifest")
    claim_output(new, resume=False)
    assert list(new.iterdir()) == []
    (new / "thesis.tex").write_text("not ours")
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty; choose a new folder"):
            claim_output(new, resume=resume)
    assert (new / "thesis.tex").exists()
    (new / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        claim_output(new, resume=False)
    claim_output(new, resume=True)
    with pytest.raises(UserError, match=r"manifest\.json is a file; wanted a folder"):
        claim_output(new / "manifest.json", resume=False)


def test_only_folders_that_were_made_are_taken_away_again(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    remove_empty(claim_output(mine, resume=False))
    assert mine.is_dir()
    made = claim_output(mine / "runs" / "one", resume=False)
    assert made == (mine / "runs" / "one", mine / "runs")
    remove_empty(made)
    assert list(mine.iterdir()) == []
    made = claim_output(mine / "runs" / "one", resume=False)
    (mine / "runs" / "two").mkdir()  # somebody else's, meanwhile
    remove_empty(made)
    assert [path.name for path in (mine / "runs").iterdir()] == ["two"]


def test_resuming_what_is_not_there_starts_anew(tmp_path):
    claim_output(tmp_path / "run", resume=True)
    assert list((tmp_path / "run").iterdir()) == []


def test_the_folder_above_a_run_and_an_unfinished_run_are_told_apart(tmp_path):
    run = tmp_path / "demo" / "run"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    unfinished = f"the run in {run} is not finished; run: geoquant quantize --out {run} --resume"
    with pytest.raises(UserError, match=f"^{re.escape(unfinished)}$"):
        read_json(run / "report.json")
    (run / "report.json").write_text("{}")
    above = f"no report.json in {run.parent}; did you mean {run}?"
    with pytest.raises(UserError, match=f"^{re.escape(above)}$"):
        read_json(run.parent / "report.json")


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no report\.json in .*; is this the folder of a finished run"):
        read_json(tmp_path / "report.json")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"x\.json is damaged.*--resume"):
        read_json(tmp_path / "x.json")
    write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(1000)})
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors")


def test_the_hash_is_sha256(tmp_path):
    # The test vector of FIPS 180-4.
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_written_json_is_readable_by_people(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    text = (tmp_path / "x.json").read_text()
    assert text.endswith("\n")
    assert json.loads(text) == {"a": 1}
    assert runs.PARTIAL not in text


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("file/sub", "cannot write .*sub: Not a directory; choose another --out folder"),
        ("x" * 300, "cannot write .*: File name too long; choose another --out folder"),
        ("/proc/foo", "cannot write /proc/foo: .*; choose another --out folder"),
    ],
)
def test_a_place_that_cannot_be_a_folder_is_one_line(place, line, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{line}$"):
        claim_output(tmp_path / place, resume=False)


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; wanted the folder of a finished run"):
        read_json(tmp_path / "file" / "report.json")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[]", "it is not a JSON object"),
        ("{}", "it lacks 'recipe'"),
        ('{"recipe": 3}', "it holds something else as 'recipe'"),
        (f'{{"recipe": {"9" * 5000}}}', "Exceeds the limit"),
    ],
)
def test_json_of_another_shape_is_damaged(text, line, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=rf"manifest\.json is damaged: {line}.*; choose a new folder$"):
        read_json(tmp_path / "manifest.json", recipe=dict)
