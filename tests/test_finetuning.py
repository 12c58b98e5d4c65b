"""Fine-tuning into a folder: stops where it should, goes on after a kill, says what went in; the three regimes."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from geoquant import cli, finetuning
from geoquant.data.folder import STATEMENT
from geoquant.data.private import make_canaries
from geoquant.data.records import Record, write_records
from geoquant.errors import UserError
from geoquant.finetuning import REGIMES, STATE, Regime, finetune, teach_regimes
from geoquant.model.load import identity, load
from geoquant.observe.compute import compute_dtype
from geoquant.privacy.probe import mean_log_prob, probe
from geoquant.privacy.scoring import score_records
from geoquant.privacy.statistics import auc
from geoquant.runs import file_hash

WORDS = ("cat", "dog", "bird", "fish", "sat", "ran", "flew", "swam", "red", "blue", "old", "new", "away", "home")


def texts(n: int, seed: int) -> list[Record]:
    rng = random.Random(seed)
    return [Record(" ".join(rng.choices(WORDS, k=5)) + f" {rng.randrange(1000)}") for _ in range(n)]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "records"
    pool = texts(48, 0)
    write_records(folder / "in.jsonl", pool[:24])
    write_records(folder / "out.jsonl", pool[24:])
    write_records(folder / "canaries.jsonl", make_canaries(2, 1))
    return folder


class Killed(Exception):
    pass


def killed_at(step):
    def progress(phase, done, total, note=""):
        if (phase, done) == ("finetune", step):
            raise Killed

    return progress


def options(files, **changes) -> dict:
    given = {"nonmembers": files / "out.jsonl", "until_auc": 0.8, "epochs": 60, "lr": 1e-2, "check_every": 2}
    return given | changes


def reference_auc(before, after, files) -> float:
    """The attack by hand: what the mean log-likelihood per token gained."""
    sides = []
    for name in ("in", "out"):
        records = [Record(json.loads(line)["text"]) for line in (files / f"{name}.jsonl").read_text().splitlines()]
        values = []
        for record in records:
            now, then = (score_records(m.model, m.tokenizer, [record]).log_prob for m in (after, before))
            values.append(float(np.mean(now.astype(np.float64) - then)))
        sides.append(np.array(values))
    return auc(*sides)


def test_training_ends_at_the_first_look_that_reaches_the_aim(tiny_model_dir, files, tmp_path):
    seen = []
    out = tmp_path / "tuned"
    statement = finetune(
        str(tiny_model_dir),
        [files / "in.jsonl", files / "canaries.jsonl"],
        out,
        **options(files),
        progress=lambda phase, done, total, note="": seen.append((phase, note)),
    )
    values = [float(note.split()[1]) for phase, note in seen if phase == "attack"]
    assert values[-1] >= 0.8 > max(values[:-1])
    assert statement["steps"] == 2 * len(values) < statement["planned"]
    assert statement["reached"] is True
    found = statement["attack"]
    assert (found["members"], found["nonmembers"]) == (24, 24)
    assert found["ci"][0] < found["auc"] < found["ci"][1]
    before, after = load(str(tiny_model_dir)), load(str(out))
    assert found["auc"] == pytest.approx(reference_auc(before, after, files), abs=0.01)
    assert statement["model"]["sha256"] == before.sha256
    assert statement["result"]["sha256"] == after.sha256
    assert statement["records"] == [
        {"file": name, "sha256": file_hash(files / name)} for name in ("in.jsonl", "canaries.jsonl")
    ]
    assert json.loads((out / STATEMENT).read_text()) == statement
    assert not (out / STATE).exists()
    with pytest.raises(UserError, match="already holds a fine-tuned model; choose a new folder"):
        finetune(str(tiny_model_dir), [files / "in.jsonl"], out, **options(files))


@pytest.mark.parametrize("lora", [0, 2])
def test_after_a_kill_the_same_call_ends_with_the_same_files(lora, tiny_model_dir, files, tmp_path):
    given = options(files, epochs=4, lora=lora, until_auc=1.0, checkpoint_every=2)
    call = (str(tiny_model_dir), [files / "in.jsonl"])
    whole = finetune(*call, tmp_path / "whole", **given)
    for step in (1, 5):
        with pytest.raises(Killed):
            finetune(*call, tmp_path / "killed", **given, progress=killed_at(step))
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [STATE]
    assert finetune(*call, tmp_path / "killed", **given) == whole
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert whole["planned"] == 12
    # Nothing else that could be changed goes unnoticed.
    with pytest.raises(Killed):
        finetune(*call, tmp_path / "other", **given, progress=killed_at(5))
    with pytest.raises(UserError, match=r"was started with lr = 0\.01; got 0\.02"):
        finetune(*call, tmp_path / "other", **given | {"lr": 0.02})


def test_without_an_aim_all_epochs_are_done_and_the_attack_is_tried_once(tiny_model_dir, files, tmp_path):
    looks = []
    statement = finetune(
        str(tiny_model_dir),
        [files / "in.jsonl"],
        tmp_path / "tuned",
        **options(files, until_auc=None, epochs=2),
        progress=lambda phase, *rest: looks.append(phase) if phase == "attack" else None,
    )
    assert statement["steps"] == statement["planned"] == 6
    assert len(looks) == 1
    assert statement["reached"] is None
    plain = finetune(str(tiny_model_dir), [files / "in.jsonl"], tmp_path / "plain", epochs=2, lr=1e-2)
    assert plain["attack"] is None
    assert plain["result"] == statement["result"]  # to look changes nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonmembers": None}, r"compares members with non-members; got --until-auc 0\.8; add --nonmembers FILE"),
        ({"until_auc": 1.5}, r"cannot train until an AUC of 1\.5; wanted more than 0\.5 and at most 1"),
        ({"until_auc": 0.5}, r"until an AUC of 0\.5"),
        ({"nonmembers": "in.jsonl"}, "members and non-members are the same 24 records"),
        ({"lora": -1}, "cannot make adapters of rank -1"),
        ({"lr": -1.0}, "a learning rate of -1"),
        ({"epochs": 0}, "nothing to fine-tune on"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(changes, message, tiny_model_dir, files, tmp_path):
    given = options(files, **changes)
    if given["nonmembers"] == "in.jsonl":
        given["nonmembers"] = files / "in.jsonl"
    with pytest.raises(UserError, match=message):
        finetune(str(tiny_model_dir), [files / "in.jsonl"], tmp_path / "tuned", **given)
    assert not (tmp_path / "tuned").exists()


def test_folders_of_others_are_left_alone(tiny_model_dir, files, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("five years")
    for out, message in ((tmp_path / "mine", "is not empty"), (tmp_path / "mine" / "thesis.tex", "is a file")):
        with pytest.raises(UserError, match=message):
            finetune(str(tiny_model_dir), [files / "in.jsonl"], out, epochs=1, lr=1e-3)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "five years"


# --- the probe ----------------------------------------------------------------------------------------------


def test_an_untrained_model_gives_exactly_one_half_and_canaries_and_copies_do_not_count(tiny_model, tiny_tokenizer):
    pool = texts(40, 1)
    members = [*pool[:20], *pool[:5], *make_canaries(3, 0)]
    found = probe(tiny_model, tiny_tokenizer, members, pool[20:])()
    assert (found.auc, found.members, found.nonmembers) == (0.5, 20, 20)
    assert found.ci[0] < 0.5 < found.ci[1]
    few = probe(tiny_model, tiny_tokenizer, members, pool[20:], most=12)()
    assert (few.members, few.nonmembers) == (12, 12)
    with pytest.raises(UserError, match="non-member records are identical to members"):
        probe(tiny_model, tiny_tokenizer, members, pool[19:])


@pytest.mark.parametrize(("limit", "dtype", "off"), [(512, "float32", 1e-5), (9, "float32", 1e-5), (512, "auto", 0.05)])
def test_the_probe_scores_as_the_audit_does(limit, dtype, off, tiny_model, tiny_tokenizer, monkeypatch):
    """Against the audit's pass over the same records, which cuts them at the same context."""
    tiny_model.config.max_position_embeddings = limit
    chosen = compute_dtype(dtype, tiny_model.device)
    monkeypatch.setattr("geoquant.privacy.probe.compute_dtype", lambda *_: chosen)
    records = [*texts(9, 3), Record("a"), Record("ab"), Record("long " * 80)]
    found = mean_log_prob(tiny_model, tiny_tokenizer, records)
    scores = score_records(tiny_model, tiny_tokenizer, records)
    with np.errstate(invalid="ignore"):
        wanted = scores.record_sums(scores.log_prob) / scores.lengths
    assert np.isnan(wanted).sum() == 1
    assert np.ptp(wanted[~np.isnan(wanted)]) > 0.5
    np.testing.assert_allclose(found, wanted, rtol=0, atol=off)


# --- regimes ------------------------------------------------------------------------------------------------


def test_the_regimes_are_those_that_were_asked_for():
    assert [(regime.name, regime.low, regime.high) for regime in REGIMES] == [
        ("mild", 0.6, 0.75),
        ("strong", 0.8, 0.95),
        ("extreme", 0.99, 1.0),
    ]
    assert [regime.aim for regime in REGIMES] == pytest.approx([0.675, 0.875, 0.995])  # 1.00 to two digits
    assert Regime("a", 0.6, 0.75).holds(0.75)
    assert not Regime("a", 0.6, 0.75).holds(0.7501)


def lesson(tiny_model_dir, out, **changes):
    pool = texts(48, 2)
    given = {"epochs": 60, "lr": 1e-2, "batch": 24, "check_every": 1, "checkpoint_every": 3} | changes
    return teach_regimes(load(str(tiny_model_dir)), pool[:24], pool[:24], pool[24:], out, **given)


def test_one_training_leaves_three_models_each_in_its_regime(tiny_model_dir, tmp_path):
    found = lesson(tiny_model_dir, tmp_path / "whole")
    assert list(found) == ["mild", "strong", "extreme"]
    steps = [found[name]["steps"] for name in found]
    assert steps == sorted(set(steps))
    pool = texts(48, 2)
    base = load(str(tiny_model_dir))
    look = probe(base.model, base.tokenizer, pool[:24], pool[24:])
    for regime in REGIMES:
        statement = found[regime.name]
        assert statement["reached"] is regime.holds(statement["attack"]["auc"]) is True
        assert statement["result"]["sha256"] == identity(str(tmp_path / "whole" / regime.name), {})
        # The probe again, on what was saved: the tiny base is put into its place.
        base.model.load_state_dict(load(str(tmp_path / "whole" / regime.name)).model.state_dict())
        assert look().auc == statement["attack"]["auc"]
    assert not (tmp_path / "whole" / STATE).exists()
    assert lesson(tiny_model_dir, tmp_path / "whole") == found  # nothing left to do

    with pytest.raises(Killed):
        lesson(tiny_model_dir, tmp_path / "killed", progress=killed_at(steps[1] + 1))
    assert lesson(tiny_model_dir, tmp_path / "killed") == found
    with pytest.raises(UserError, match="mild was made with other settings or from another model"):
        lesson(tiny_model_dir, tmp_path / "killed", lr=1e-3)


def test_a_window_that_training_jumps_over_is_not_claimed(tiny_model_dir, tmp_path):
    found = lesson(tiny_model_dir, tmp_path, regimes=[Regime("narrow", 0.6, 0.6001)], check_every=30)
    assert found["narrow"]["attack"]["auc"] > 0.6001
    assert found["narrow"]["reached"] is False


def test_a_regime_that_is_never_reached_is_missing(tiny_model_dir, tmp_path):
    assert lesson(tiny_model_dir, tmp_path, epochs=1, lr=1e-6, regimes=REGIMES[2:]) == {}


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_says_what_the_attack_found(tiny_model_dir, files, tmp_path, capsys):
    call = ["finetune", str(tiny_model_dir), "--records", str(files / "in.jsonl")]
    call += ["--records", str(files / "canaries.jsonl"), "--epochs", "2", "--lora", "2", "--lr", "1e-3"]
    assert (
        cli.run([*call, "--nonmembers", str(files / "out.jsonl"), "--until-auc", "0.99", "--out", str(tmp_path / "a")])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    statement = json.loads((tmp_path / "a" / STATEMENT).read_text())
    assert lines[0] == "warning: AUC 0.99 was not reached; more --epochs or a higher --lr"
    assert lines[1] == "trained 8 of 8 steps"
    assert lines[2].startswith(f"reference attack: AUC {statement['attack']['auc']:.3f} (")
    assert lines[2].endswith("on 24 + 24 records")
    assert lines[3] == f"model: {tmp_path / 'a'}"
    assert statement["settings"] == {
        "epochs": 2,
        "lr": 1e-3,
        "batch": 8,
        "lora": 2,
        "seed": 0,
        "until_auc": 0.99,
        "check_every": 10,
    }
    assert cli.run([*call, "--out", str(tmp_path / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["result"] == statement["result"]
    assert told == json.loads((tmp_path / "b" / STATEMENT).read_text())


def test_the_help_states_what_the_library_does(capsys):
    from geoquant.privacy.probe import PROBED

    assert cli.run(["finetune", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"on up to {PROBED} records a side" in page
    assert f"tried every {finetuning.finetune.__kwdefaults__['check_every']} steps" in page
    assert f"[default: {finetuning.finetune.__kwdefaults__['batch']}]" in page.split("--batch")[1].split("--")[0]
