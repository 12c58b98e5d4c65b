"""The command line: cheap help, exit codes, one-line errors, pure JSON, and flags that become the recipe.

The library below is played by stand-ins where its work is not what is tested.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import geoquant
from geoquant import cli
from geoquant.cli import audit, doctor, explain, screen, verify
from geoquant.cli.options import RecipeFlags
from geoquant.cli.plan import alike
from geoquant.cli.screen import Lines, duration, plain_value
from geoquant.cli.summary import metrics
from geoquant.errors import UserError
from geoquant.recipe import Recipe

SITE = {
    "name": "model.layers.0.mlp.down_proj",
    "kind": "mlp_out",
    "block": 0,
    "shape": [32, 48],
    "method": "dqc",
    "order": "group-aware",
    "damping": 0.01,
    "bits": 3,
    "bits_per_weight": 3.5,
    "kept": 1,
    "kept_columns": [7],
    "error": 0.02,
    "heldout_error": 0.03,
    "expected_error": 0.016,
    "bound": 0.05,
    "clip_rate": 0.001,
    "massive_tokens": {"largest": 1234.0, "top_share": 0.75},
    "reason": "column 7 kept: would cost 40% of the error",
}
REPORT = {
    "model": {"name": "tiny", "dtype": "float32"},
    "recipe": {"bits": 3, "method": "dqc"},
    "size": {"bits_per_weight": 3.25, "total_bytes": 20e6, "original_bytes": 100e6},
    "quality": {
        "text": "prose",
        "original": {"perplexity": 20.0, "nll": 2.9957, "se": 0.01, "tokens": 100},
        "quantized": {"perplexity": 25.0, "nll": 3.2189, "se": 0.02, "tokens": 100},
    },
    "privacy": {
        "attacks": [
            {"name": name, "subject": subject, "auc": auc, "ci": [auc - 0.1, auc + 0.1], "tpr_at_fpr": rates}
            for name, subject, auc, rates in [
                ("loss", "original", 0.60, {"0.01": {"tpr": 0.05, "ci": [0.0, 0.1]}}),
                ("loss", "quantized", 0.55, {"0.01": {"tpr": 0.02, "ci": [0.0, 0.1]}}),
                ("reference", "base", 0.999, {"0.01": 1.0}),
                ("reference", "original", 0.85, {"0.01": {"tpr": 0.40, "ci": [0.3, 0.5]}}),
                ("reference", "quantized", 0.75, {"0.01": {"tpr": 0.20, "ci": [0.1, 0.3]}}),
            ]
        ],
        "extraction": [
            {"subject": "original", "kind": "phone", "spans": 10, "extracted": 4},
            {"subject": "original", "kind": "card", "spans": 10, "extracted": 1},
            {"subject": "quantized", "kind": "phone", "spans": 20, "extracted": 0},
        ],
        "exposure": [{"subject": "original", "mean_bits": 12.3, "limit_bits": 19.9}],
    },
    "sites": [SITE, SITE | {"name": "model.layers.1.mlp.down_proj", "heldout_error": 0.01}],
    "warnings": ["3-bit codes are stored in 4-bit words"],
}


@pytest.fixture
def library(monkeypatch):
    """Stands in for the modules that do the work: set a function on it, and the commands call that."""
    fake = SimpleNamespace()
    for name in ("pipeline", "examine", "auditing"):
        monkeypatch.setitem(sys.modules, f"geoquant.{name}", fake)
        monkeypatch.setattr(geoquant, name, fake, raising=False)
    return fake


@pytest.fixture
def finished(tmp_path):
    """A run folder that holds a report."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text(json.dumps(REPORT))
    return run


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def without_progress(text: str) -> list[str]:
    """Lines on stderr that do not start with the time."""
    return [line for line in text.splitlines() if not line.startswith("[")]


def raising(error):
    def act(*arguments, **options):
        raise error

    return act


# --- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"]])
def test_the_overview_takes_less_than_half_a_second(arguments):
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([sys.executable, "-m", "geoquant", *arguments], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert shown.returncode == 0
        assert shown.stderr == ""
    # CPU time, because the cores may be busy with other things.
    assert min(times) < 0.5


def test_no_help_page_imports_torch_and_each_shows_an_example():
    child = python(
        "import sys\n"
        "from geoquant import cli\n"
        "for name in cli.COMMANDS:\n"
        "    print('page of', name)\n"
        "    assert cli.run([name, '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    assert child.returncode == 0, child.stderr
    pages = child.stdout.split("page of ")[1:]
    assert len(pages) == len(cli.COMMANDS)
    for page in pages:
        name = page.split()[0]
        assert f"For example:\n\n  geoquant {name}" in page


def test_the_overview_needs_not_even_the_parser():
    child = python("import sys\nfrom geoquant import cli\ncli.run(['--help'])\nsys.exit('cyclopts' in sys.modules)")
    assert child.returncode == 0
    assert all(f"  {name} " in child.stdout for name in cli.COMMANDS)


def test_help_states_the_defaults_of_the_recipe(capsys):
    assert cli.run(["quantize", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split()).split("Parameters")[1]
    words = {
        "symmetric": "symmetric",
        "verify": "verify",
        "static_scales": "false",
        "embeddings": "yes",
        "foldable": "yes",
    }
    for name, field in Recipe.model_fields.items():
        if name == "model" or field.default is None:
            continue
        default = field.default[0] if isinstance(field.default, tuple) else field.default
        flag = {"formats": "--format", "static_scales": "--static-scales"}.get(name, "--" + name.replace("_", "-"))
        stated = page.split(f"{flag} ")[1].split("(default ")[1].split(")")[0]
        assert stated == words.get(name, str(default)), name


@pytest.mark.parametrize("command", ["audit", "eval"])
def test_commands_that_read_any_model_say_that_a_run_is_one(command, capsys):
    assert cli.run([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert "Run folder, Hugging Face folder" in page
    assert "RUN/model" not in page  # a run of the lattice has none, one with kept columns has holes there


def test_eval_names_the_text_it_measured(library, capsys):
    found = {"perplexity": 9.8, "nll": 2.28, "se": 0.1, "tokens": 511, "text": "the built-in text"}
    library.evaluate = lambda *_, **__: found
    assert cli.run(["eval", "m"]) == 0
    assert "text        the built-in text" in capsys.readouterr().out.splitlines()


def test_the_help_of_eval_shows_a_task_that_can_be_read(capsys, tmp_path):
    from geoquant.evaluate.tasks import load_task

    assert cli.run(["eval", "--help"]) == 0
    page = capsys.readouterr().out
    assert "geoquant eval MODEL --task piqa.jsonl --task arc.jsonl" in page
    (line,) = (line for line in page.splitlines() if line.strip().startswith("{"))
    (tmp_path / "task.jsonl").write_text(line)
    assert load_task(tmp_path / "task.jsonl").items[0].gold == 1


def test_the_package_itself_costs_nothing_and_names_its_api():
    child = python("import sys, geoquant\nprint(*dir(geoquant))\nsys.exit('torch' in sys.modules)")
    assert child.returncode == 0
    assert child.stdout.split() == sorted(geoquant.__all__)
    assert geoquant.UserError is UserError
    assert geoquant.Recipe is Recipe
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = geoquant.quantise


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert geoquant.__version__ == project["version"]


# --- exit codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["quantise"], 'Unknown command "quantise". Did you mean "quantize"?'),
        (["quantize", "m", "--out", "o", "--bots", "3"], "Unknown option: --bots. Did you mean --bits?"),
        (["quantize", "m"], "error: --out is missing (see: geoquant quantize --help)"),
        (["quantize", "m", "--out"], 'Command "quantize" parameter --out requires an argument.'),
        (["quantize", "--model", "m", "--out", "o"], "MODEL stands by itself: geoquant COMMAND MODEL"),
        (["plan", "--model=m"], "MODEL stands by itself"),
        (["audit", "m", "--members", "i"], "error: --nonmembers is missing (see"),
        (
            ["audit", "m", "--members", "i", "--nonmember", "o"],
            "--nonmembers is missing. Did you mean --nonmembers instead of --nonmember?",
        ),
        (["audit", "--members", "i", "--nonmembers", "o"], "error: MODEL is missing (see"),
        (
            ["quantize", "m", "--out", "o", "--bits", "three"],
            'Invalid value for --bits: unable to convert "three"',
        ),
        (
            ["quantize", "m", "--out", "o", "--bits", "9"],
            "option bits: Input should be less than or equal to 8",
        ),
        (["plan", "m", "--bits", "3.5"], 'Invalid value for --bits: unable to convert "3.5" into a whole number'),
        (["quantize", "m", "--out", "o", "--forget", "1.5"], 'Invalid value for --forget: unable to convert "1.5"'),
        (["quantize", "m", "--out", "o", "--refine", "1.5"], 'Invalid value for --refine: unable to convert "1.5"'),
        (
            ["bench", "geometry", "m", "--analysis", "a", "--out", "o", "--bits", "2.5"],
            'Invalid value for --bits: unable to convert "2.5"',
        ),
        (["plan", "m", "--windows", "1e400"], 'Invalid value for --windows: unable to convert "1e400"'),
        (["eval", "m", "--window", "64.2"], 'Invalid value for --window: unable to convert "64.2"'),
        (["audit", "m", "--members", "i", "--nonmembers", "o", "--seed", "0.5"], "Invalid value for --seed"),
        (["quantize", "--out", "x" * 300, "--resume"], "nothing to resume in xxx"),
        (["quantize", "--out", "o"], "no model given; wanted MODEL or --recipe FILE"),
        (["quantize", "--out", "o", "--recipe", "none.toml"], "no recipe file none.toml"),
        (["quantize", "--out", "o", "--resume"], "nothing to resume in o"),
        (["explain", "none"], "no report.json in none"),
        (["verify", "none"], "nothing to verify in none"),
        (["compare"], "no runs given"),
        (["list", "method"], "did you mean 'methods'?"),
        (["export", "none", "--to", "dens"], "did you mean 'dense'?"),
        (["records", "--domain", "medcal", "--out", "o"], "did you mean 'medical'?"),
        (["records", "--domain", "cars", "--out", "o"], "choose one of: code, finance, medical, support"),
        (["records", "--domain", "code", "--out", "o", "--n", "7"], "cannot make 7 records; wanted 100 to 50000"),
        (["records", "--domain", "code", "--out", "o", "--n", "1e3"], "Invalid value for --n"),
        (["records", "--domain", "code", "--out", "o", "--seed", "-1"], "cannot use seed -1"),
        (["records", "--domain", "code", "--out", "o", "--canaries", "-1"], "cannot make -1 canaries"),
        (["records", "--domain", "code", "--out", "/"], "output folder / is not empty; choose a new folder"),
        (["finetune", "m", "--out", "o"], "error: --records is missing (see"),
        (["finetune", "m", "--records", "r", "--out", "o", "--lora", "1.5"], "Invalid value for --lora"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("geoquant: error: ")
    assert line in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_user_error_from_the_library_is_one_line(library, capsys):
    library.quantize = raising(UserError("no text file x.txt"))
    assert cli.run(["quantize", "m", "--out", "o"]) == 2
    assert without_progress(capsys.readouterr().err) == ["geoquant: error: no text file x.txt"]


def test_a_bug_shows_its_traceback_and_says_that_it_is_one(library, capsys):
    library.quantize = raising(ZeroDivisionError("oops"))
    assert cli.run(["quantize", "m", "--out", "o"]) == 1
    lines = without_progress(capsys.readouterr().err)
    assert lines[0].startswith("Traceback")
    assert lines[-2] == "ZeroDivisionError: oops"
    assert lines[-1].startswith("geoquant: this is a bug")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "disk full while writing /x/y"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
def test_what_the_machine_lacks_is_not_called_a_bug(error, line, library, capsys):
    library.quantize = raising(error)
    assert cli.run(["quantize", "m", "--out", "o"]) == 2
    (shown,) = without_progress(capsys.readouterr().err)
    assert shown.startswith(f"geoquant: error: {line}")


def test_ctrl_c_says_how_to_go_on():
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, types, time, geoquant\n"
            "def quantize(*arguments, **options):\n"
            "    print('working', file=sys.stderr, flush=True)\n"
            "    time.sleep(60)\n"
            "fake = types.SimpleNamespace(quantize=quantize)\n"
            "geoquant.pipeline = sys.modules['geoquant.pipeline'] = fake\n"
            "from geoquant import cli\n"
            "cli.main(['quantize', 'm', '--out', 'o'])\n",
        ],
        stderr=subprocess.PIPE,
        text=True,
        # Who starts the tests in the background of a shell has them ignore Ctrl-C, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "working\n" in iter(child.stderr.readline, "")
    child.send_signal(signal.SIGINT)
    rest = child.communicate(timeout=30)[1]
    assert child.returncode == 130
    line = "geoquant: interrupted; finished sites are kept: add --resume to the same command to go on"
    assert rest.split("\n") == ["", line, ""]


def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    child = subprocess.run([sys.executable, "-m", "geoquant", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert child.returncode == 141
    assert child.stderr == b""


# --- JSON ---------------------------------------------------------------------------------------------------


def test_json_is_one_object_whatever_libraries_print():
    child = python(
        "import os, sys, types, geoquant, numpy\n"
        "def evaluate(*arguments, items):\n"
        "    print('a library talks')\n"
        "    os.write(1, b'so does its C part\\n')\n"
        "    arguments[-1]('measure', 1, 1)\n"
        "    numbers = {'perplexity': numpy.float64(7.5), 'tokens': numpy.int64(3)}\n"
        "    return numbers | {'nll': float('nan'), 'se': None}\n"
        "fake = types.SimpleNamespace(evaluate=evaluate)\n"
        "geoquant.examine = sys.modules['geoquant.examine'] = fake\n"
        "from geoquant import cli\n"
        "cli.main(['eval', 'm', '--json'])\n"
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == {"perplexity": 7.5, "nll": None, "se": None, "tokens": 3}
    assert "a library talks" in child.stderr
    assert "so does its C part" in child.stderr


def test_json_of_a_failed_command_is_empty(library, capsys):
    library.evaluate = raising(UserError("no"))
    assert cli.run(["eval", "m", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_values_become_json_types(tmp_path):
    import torch

    value = {1: (tmp_path, float("inf")), "t": torch.tensor([1.0, float("nan")]), "b": True, "s": {3}}
    assert plain_value(value) == {"1": [str(tmp_path), None], "t": [1.0, None], "b": True, "s": [3]}


# --- flags --------------------------------------------------------------------------------------------------


def test_every_field_of_the_recipe_has_a_flag():
    assert set(RecipeFlags.__dataclass_fields__) == set(Recipe.model_fields) - {"model"}


@pytest.fixture
def asked(library, finished):
    """Runs `quantize` and returns what the library was asked for."""
    seen = {}

    def quantize(recipe, out, *, resume, progress, command):
        seen.update(recipe=recipe, out=out, resume=resume, command=command)
        return REPORT

    library.quantize = quantize

    def ask(*arguments):
        assert cli.run(["quantize", *arguments, "--out", str(finished)]) == 0
        return seen

    return ask


def test_no_flags_means_the_defaults(asked):
    assert asked("m")["recipe"] == Recipe(model="m")
    assert asked("m")["resume"] is False


def test_flags_become_the_recipe(asked):
    flags = "--bits 3 --group-size 32 --asymmetric --keep 0.01 --method dqc --metric plain --order natural"
    more = "--damping 0.02 --static-scales --sequential block --target weights --no-verify"
    files = "--format dense --format compressed-tensors --calibration c.txt --text e.txt --members i"
    sizes = "--nonmembers o --windows 3 --window 64 --seed 5"
    assert asked("m", *f"{flags} {more} {files} {sizes}".split())["recipe"] == Recipe(
        model="m",
        bits=3,
        group_size=32,
        symmetric=False,
        keep=0.01,
        method="dqc",
        metric="plain",
        order="natural",
        damping=0.02,
        static_scales=True,
        sequential="block",
        target="weights",
        verify=False,
        formats=("dense", "compressed-tensors"),
        calibration="c.txt",
        windows=3,
        window=64,
        evaluation="e.txt",
        members="i",
        nonmembers="o",
        seed=5,
    )


def test_flags_overrule_the_recipe_file(asked, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('model = "base"\nbits = 3\nkeep = 0.01\n')
    assert asked("--recipe", str(file), "--bits", "5")["recipe"] == Recipe(model="base", bits=5, keep=0.01)


def test_resume_needs_no_more_than_the_folder(asked, finished):
    recipe = Recipe(model="base", bits=3)
    (finished / "manifest.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    seen = asked("--resume")
    assert seen["recipe"] == recipe
    assert seen["resume"] is True


# --- what is shown ------------------------------------------------------------------------------------------


def test_the_summary_shows_the_stronger_attack_and_every_number():
    assert metrics(REPORT, "original") == {
        "bits per weight (linear layers)": "32",
        "megabytes on disk": "100.0",
        "perplexity": "20.00 ± 0.20",
        "AUC, reference attack": "0.850 [0.750, 0.950]",
        "TPR at 1% FPR": "40.0%",
        "private spans extracted": "25.0% of 20",
        "canary exposure (bits)": "12.3 of 19.9",
    }
    quantized = metrics(REPORT, "quantized")
    assert quantized["bits per weight (linear layers)"] == "3.25"
    assert quantized["AUC, reference attack"] == "0.750 [0.650, 0.850]"
    assert quantized["private spans extracted"] == "0.0% of 20"
    assert "canary exposure (bits)" not in quantized


def test_the_last_line_is_the_report(asked, finished, capsys):
    (finished / "report.html").write_text("<html>")
    asked("m")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {finished / 'report.html'}"
    assert lines[0] == "warning: 3-bit codes are stored in 4-bit words"
    perplexity = next(line for line in lines if "perplexity" in line)
    assert perplexity.index("20.00") < perplexity.index("25.00")


def test_a_report_without_leakage_has_no_leakage_rows():
    assert list(metrics(REPORT | {"privacy": None}, "original"))[-1] == "perplexity"


def audited() -> dict:
    """What `audit` finds: two models, p-values, a clean gate."""
    rates = {
        "0.1": {"tpr": 1.0, "ci": [0.4, 1.0]},
        "0.01": {"tpr": 0.5, "ci": [0.4, 0.6]},
        "0.001": {"tpr": None, "ci": None, "needed": 1000},
    }
    attacks = [
        {"name": name, "subject": subject, "auc": auc, "ci": [auc - 0.1, auc], "p_holm": p, "tpr_at_fpr": rates}
        for name, subject, auc, p in (("reference", "base", 0.51, 0.8), ("loss", "original", 0.9, 1e-9))
    ]
    change = {"attack": "loss", "from": "base", "to": "original", "difference": 0.39, "ci": [0.3, 0.48]}
    gate = {"valid": True, "auc": 0.488, "ci": [0.43, 0.54], "alarm": 0.593}
    verdict = [
        {"subject": "base", "attack": "loss", "separates": False, "level": 0.05},
        {"subject": "original", "attack": "loss", "separates": True, "level": 0.05},
    ]
    found = {"attacks": attacks, "comparisons": [change | {"p_holm": 3e-9}], "gate": gate, "verdict": verdict}
    found |= {"n_members": 12, "n_nonmembers": 14}
    return found | {"no_verdict": None, "extraction": [], "exposure": [], "warnings": ["200 is few"]}


def test_the_audit_says_what_was_tested_and_promises_nothing(capsys):
    audit.show(audited())
    text = capsys.readouterr().out
    assert "records: without any model, AUC 0.49 (0.43 – 0.54); 0.59 would be an alarm" in text
    assert "reference to this model: AUC of loss +0.390 (+0.300 – +0.480), p < 0.0001" in text
    few = "reference: no attack tried tells members apart at level 0.05, by 12 members and 14 non-members; others may"
    assert few in text
    assert "this model: members are told apart (attack loss)" in text
    row = next(line for line in text.splitlines() if "this model" in line and "0.900" in line)
    assert row.split()[-5:] == ["<", "0.0001", "100.0%", "50.0%", "–"]
    assert text.splitlines()[-1].startswith("no formal guarantee")
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines() if "0.9" in line or "interval" in line)


def test_the_audit_refuses_a_verdict_first(capsys):
    found = audited() | {"no_verdict": "told apart by their words alone", "verdict": None}
    for entry in (*found["attacks"], *found["comparisons"]):
        entry["p_holm"] = None
    audit.show(found)
    text = capsys.readouterr().out
    assert text.startswith("NO VERDICT: told apart by their words alone\n")
    assert "members are told apart" not in text
    assert "< 0.0001" not in text
    gated = REPORT | {"privacy": REPORT["privacy"] | {"no_verdict": "they differ", "gate": {"auc": 0.777}}}
    assert metrics(gated, "quantized")["verdict on leakage"] == "none: blind AUC 0.78"


def test_explain_finds_a_site_by_the_end_of_its_name():
    assert explain.find_site("1.mlp.down_proj", REPORT["sites"])["name"] == "model.layers.1.mlp.down_proj"
    with pytest.raises(UserError, match=r"2 sites end with 'mlp\.down_proj'"):
        explain.find_site("mlp.down_proj", REPORT["sites"])
    for wrong in ("model.layers.0.mlp.down_porj", "0.mlp.down_porj"):
        with pytest.raises(UserError, match=r"did you mean 'model\.layers\.0\.mlp\.down_proj'"):
            explain.find_site(wrong, REPORT["sites"])
    with pytest.raises(UserError, match=r"'0\.mlp' is no site, but 1 site lies below it.*: model\.layers\.0\.mlp"):
        explain.find_site("0.mlp", REPORT["sites"])
    with pytest.raises(UserError, match=r"2 sites lie below it; .*0\.mlp\.down_proj, model\.layers\.1\.mlp"):
        explain.find_site("model.layers", REPORT["sites"])
    with pytest.raises(UserError, match="see all: geoquant explain RUN"):
        explain.find_site("zzz", REPORT["sites"])


def test_explain_gives_the_decision_in_numbers(finished, capsys):
    assert cli.run(["explain", str(finished), "0.mlp.down_proj"]) == 0
    text = capsys.readouterr().out
    for fact in (
        "3 bits; 3.50 bits per weight",
        "column 7 kept: would cost 40% of the error",
        "1 columns at 16 bits (2.1% of 48): 7",
        "0.02 of the site's output energy",
        "0.03 on the tokens that chose the damping",
        "achieved / expected = 1.25",
        "0.05 not exceeded, but no promise: 0.10% of the codes were clipped",
        "1,234 times the median energy; the top 0.1% of tokens hold 75.0% of it",
        "1 of 2 by error",
    ):
        assert fact in text
    # The report is older than the sphere bound: nothing is said about it.
    assert "sphere" not in text
    assert "headroom" not in text
    assert cli.run(["explain", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"sites": REPORT["sites"]}


def test_explain_tells_the_headroom_without_a_reduction():
    """Gap = what a cube is no ball + headroom + what rows take over; the share follows from the headroom."""
    profile = {"lengths": [4.46, 0.0, -3.04], "steps": [4.4, 0.1, -4.2]}
    limits = {"sphere_bound": 0.0098, "gap_db": 2.1329, "headroom_db": 0.6, "rows_db": 0.0, "profile": profile}
    text = "\n".join(explain.limit_lines(SITE | limits))
    for fact in (
        "0.0098: no lattice of this density could expect less; the expectation lies 2.13 dB above",
        "1.53 because a cube is no ball, 0.60 headroom\n",
        "could lower the expected error by 12.9% at most",
        "the box of codes would not survive it",
        "lengths r -3.0 to +4.5 dB; with their steps, r s, -4.2 to +4.4 dB around the geometric mean",
    ):
        assert fact in text
    assert "lies below" not in text
    unboxed = {"bits": None, "headroom_db": 0.0, "rows_db": 0.6, "sphere_bound": 0.03, "profile": None}
    text = "\n".join(explain.limit_lines(SITE | limits | unboxed))
    assert "0.00 headroom, 0.60 that rows take over" in text
    assert "by 0.0% at most" in text
    assert "the achieved error lies below" in text
    assert "box" not in text
    assert "profile" not in text
    assert explain.limit_lines(SITE | dict.fromkeys(limits)) == []


def test_compare_lists_only_settings_that_differ(finished, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    changed = REPORT | {"recipe": {"bits": 4, "method": "dqc"}}
    (other / "report.json").write_text(json.dumps(changed))
    assert cli.run(["compare", str(finished), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    bits = next(line for line in lines if " bits " in line and "weight" not in line and "exposure" not in line)
    assert bits.index("3") < bits.index("4")
    assert not any("method" in line for line in lines)
    assert cli.run(["compare", str(finished), str(other), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["recipe"]["bits"] for run in runs] == [3, 4]


def test_plan_puts_alike_sites_on_one_line():
    sites = [{"name": f"model.layers.{block}.q", "block": block, "bits": 3} for block in range(4)]
    sites[2]["bits"] = 4
    assert [(name, len(group)) for name, group in alike(sites)] == [
        ("model.layers.*.q", 3),
        ("model.layers.2.q", 1),
    ]


def test_verify_pairs_each_export_with_its_adapter(tmp_path):
    for name in ("model", "dense", "adapter"):
        (tmp_path / name).mkdir()
    for name in ("model", "dense"):
        (tmp_path / name / "config.json").write_text("{}")
    expected = tmp_path / "expected.safetensors"
    with pytest.raises(UserError, match="nothing to verify"):
        verify.exports_in(tmp_path)
    expected.write_bytes(b"")
    assert verify.exports_in(tmp_path) == [
        (tmp_path / "dense", expected, None),
        (tmp_path / "model", expected, tmp_path / "adapter"),
    ]
    assert verify.exports_in(tmp_path / "dense") == [(tmp_path / "dense", expected, None)]


def test_progress_as_lines_is_sparse_and_ends_every_phase(capsys):
    now = [0.0]
    progress = Lines(sys.stderr, clock=lambda: now[0])
    for step in range(101):
        now[0] = step * 1.0
        progress("solve", step, 100, f"site {step}")
    progress("solve", 100, 100)
    progress("load", 0, 0, "weights")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[  0.0 s] solve  0/100  site 0"
    assert lines[1] == "[   10 s] solve  10/100  about 1 min 30 s left  site 10"
    assert lines[-2] == "[1 min 40 s] solve  100/100  done in 1 min 40 s"
    assert lines[-1].endswith("load  weights")
    assert len(lines) == 12


def test_a_phase_that_reports_late_is_given_the_time_it_took(capsys):
    now = [0.0]
    progress = Lines(sys.stderr, clock=lambda: now[0])
    for now[0], phase, done, total in (
        (0.0, "start", 0, 1),
        (5.0, "start", 1, 1),
        (65.0, "perplexity", 4, 4),  # nothing was said before its end
        (95.0, "scores", 10, 30),
        (125.0, "scores", 30, 30),
    ):
        progress(phase, done, total)
    lines = capsys.readouterr().err.splitlines()
    assert lines[2] == "[1 min 05 s] perplexity  4/4  done in 1 min 00 s"
    assert lines[-1] == "[2 min 05 s] scores  30/30  done in 1 min 00 s"


def test_durations_read_well():
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.6, 3599, 3600, 7290)] == [
        "0.0 s",
        "9.9 s",
        "10 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "2 h 01 min",
    ]


def test_bars_run_on_a_terminal(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with screen.progress_display(terminal) as progress:
        progress("solve", 0, 4, "[odd] note")
        progress("solve", 4, 4)
    assert "solve" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


# --- records ------------------------------------------------------------------------------------------------


def test_records_are_made_and_their_use_is_shown(tmp_path, capsys):
    out = tmp_path / "made"
    call = ["records", "--domain", "support", "--n", "120", "--seed", "3", "--canaries", "8", "--out", str(out)]
    assert cli.run(call) == 0
    lines = capsys.readouterr().out.splitlines()
    statement = json.loads((out / "statement.json").read_text())
    assert [line.split()[0] for line in lines] == [
        str(out / f"{name}.jsonl") for name in ("train", "members", "nonmembers", "holdout", "canaries")
    ] + [str(out / "statement.json")]
    assert f"{statement['counts']['included']} of 8 are planted" in lines[4]
    again = statement["command"].split()[1:]
    assert cli.run([*again, "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == statement
    assert (out / "train.jsonl").read_bytes() == (tmp_path / "again" / "train.jsonl").read_bytes()


def test_the_help_of_records_names_every_domain(capsys):
    from geoquant.data.domains import DOMAINS

    assert cli.run(["records", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(domain in page.split("What they are about:")[1].split(".")[0] for domain in DOMAINS)


# --- list and doctor ----------------------------------------------------------------------------------------


def test_list_describes_every_name(capsys):
    assert cli.run(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        *("methods", "metrics", "orders", "formats", "attacks", "domains", "scores"),
        *("goals", "points"),
    }
    assert {"rtn", "babai", "dqc"} <= set(found["methods"])
    assert Recipe.model_fields["metric"].default in found["metrics"]
    assert Recipe.model_fields["order"].default in found["orders"]
    assert all(line for entries in found.values() for line in entries.values())


def test_doctor_finds_a_torchvision_that_does_not_fit(tmp_path, monkeypatch):
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problems = doctor.torchvision_problems()
    assert len(problems) == 1
    assert "operator torchvision::nms does not exist" in problems[0]
    assert "pip uninstall torchvision" in problems[0]
    (broken / "__init__.py").write_text("")
    assert doctor.torchvision_problems() == []


@pytest.mark.parametrize(
    "text", ["raise ImportError('Numba needs NumPy 2.3 or less')", "raise OSError('no libllvmlite.so')"]
)
def test_a_numba_that_cannot_be_imported_is_one_line(text, tmp_path, monkeypatch):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(f"def load():\n    {text}\nload()\n")
    reason = text.split("'")[1]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    child = python("from geoquant import cli\ncli.main(['list', 'methods'])")
    assert (child.returncode, child.stdout) == (2, "")
    said = f"numba, which compiles the solvers, is missing or broken: {reason}; run: pip install -U numba"
    assert child.stderr == f"geoquant: error: {said}\n"
    (problem,) = doctor.numba_problems()
    assert reason in problem
    assert problem.endswith("; run: pip install -U numba")


def test_a_failure_of_a_numba_that_works_stays_a_bug():
    import numba

    with pytest.raises(numba.TypingError) as caught:
        numba.njit(lambda: nowhere)()  # noqa: F821
    assert not cli.breaks_on_import(caught.value, "numba")
    assert cli.breaks_on_import(ModuleNotFoundError("No module named 'numba'", name="numba"), "numba")


def test_doctor_compares_versions_with_the_requirements(monkeypatch):
    wanted = ["pytest>=999", "no-such-package>=1", "numpy>=1", 'peft>=999; extra == "peft"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    problems = doctor.package_problems()
    assert len(problems) == 2
    assert problems[0].endswith("wanted pytest>=999; run: pip install 'pytest>=999'")
    assert problems[1] == "no-such-package is missing; wanted no-such-package>=1; run: pip install 'no-such-package>=1'"


def test_doctor_exit_code_follows_the_problems(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "compute_facts", dict)
    monkeypatch.setattr(doctor, "package_problems", list)
    monkeypatch.setattr(doctor, "torchvision_problems", list)
    monkeypatch.setattr(doctor, "numba_problems", list)
    assert cli.run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    monkeypatch.setattr(doctor, "torchvision_problems", lambda: ["torchvision does not fit"])
    assert cli.run(["doctor", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["problems"] == ["torchvision does not fit"]
    assert shown.err == "geoquant: error: torchvision does not fit\n"


def test_matrix_speed_is_plausible(monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "GEMM_SECONDS", 0.05)
    started = time.perf_counter()
    assert 0.05 < doctor.gemm_speed(torch.float32) < 1e6
    assert time.perf_counter() - started < 30
