"""Shadow models of a tiny real model: who was trained on what, what their scores tell, and a run that goes on."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_tokenizer, tiny_llama
from geoquant.data.records import Canary, Record, Split
from geoquant.errors import UserError
from geoquant.model.load import load
from geoquant.privacy.attacks import membership_scores
from geoquant.privacy.attacks.combined import combine
from geoquant.privacy.attacks.lira import halves
from geoquant.privacy.delong import paired_difference
from geoquant.privacy.evidence import gather
from geoquant.privacy.finetune import finetune
from geoquant.privacy.scoring import score_records
from geoquant.privacy.shadows import ShadowSettings, tied, train_shadows
from geoquant.privacy.statistics import auc, chance_p

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "off", "to", "see", "some", "fish")
SETTINGS = ShadowSettings(epochs=4, learning_rate=5e-3)
SIDE = 40


def text(rng: random.Random) -> str:
    """Eight words, a share of them random letters: some records are hard for everyone, some are easy."""
    share = rng.random()
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = (
        "".join(rng.choice(letters) for _ in range(4)) if rng.random() < share else rng.choice(WORDS) for _ in range(8)
    )
    return " ".join(made)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A public model that knows the kind of text, in a folder."""
    folder, tokenizer, rng = tmp_path_factory.mktemp("public"), make_tokenizer(), random.Random(0)
    model = tiny_llama()
    finetune(model, tokenizer, [Record(text(rng)) for _ in range(100)], epochs=10, lr=1e-2, batch=10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def split() -> Split:
    rng = random.Random(1)
    pool = [Record(text(rng)) for _ in range(2 * SIDE)]
    return Split(tuple(pool[:SIDE]), tuple(pool[SIDE:]))


@pytest.fixture(scope="module")
def trained(base, split, tmp_path_factory):
    """Four shadows and the folder with their scores."""
    folder = tmp_path_factory.mktemp("shadows")
    return train_shadows(lambda: load(base), split, 4, SETTINGS, folder), folder


def attacked(base: str, split: Split, trained, seen=()) -> dict:
    """The scores of both sides under all attacks, after a fine-tune of the base on `seen`."""
    loaded = load(base)
    sides = split.members, split.nonmembers
    before = [score_records(loaded.model, loaded.tokenizer, side) for side in sides]
    if seen:
        loaded.model.requires_grad_(True)
        finetune(loaded.model, loaded.tokenizer, seen, epochs=4, lr=5e-3, seed=99)
    after = [score_records(loaded.model, loaded.tokenizer, side) for side in sides]
    shadows = trained.members, trained.nonmembers
    return membership_scores(*(gather(*one[:3], shadows=one[3]) for one in zip(sides, after, before, shadows)))


def test_shadows_find_what_the_loss_attack_misses(base, split, trained):
    found = attacked(base, split, trained[0], split.members)
    assert auc(*found["loss"]) < 0.75
    for name in ("lira", "rmia"):
        assert auc(*found[name]) > 0.85
        difference = paired_difference(found["loss"], found[name])
        assert difference.value > 0.15
        assert difference.p < 0.001
    both = combine(found, permutations=99)
    assert both.p == 0.01
    assert set(both.attacks) == set(found) >= {"lira", "rmia", "loss", "reference"}
    assert auc(*both.scores) > auc(*found["loss"]) + 0.1


def test_where_the_target_saw_neither_side_nothing_is_found(base, split, trained):
    """The base itself, and a fine-tune on other records of the kind: Holm's level over all attacks stays below 5%."""
    rng = random.Random(2)
    for seen in ((), [Record(text(rng)) for _ in range(SIDE)]):
        found = attacked(base, split, trained[0], seen)
        p = [chance_p(*sides) for sides in found.values()] + [combine(found, permutations=99).p]
        assert min(p) * len(p) > 0.05


def test_each_shadow_remembers_its_own_half_and_only_that(base, split, trained):
    shadows = trained[0]
    inside = np.concatenate([shadows.members.inside, shadows.nonmembers.inside], axis=1)
    np.testing.assert_array_equal(inside, halves(4, 2 * SIDE, SETTINGS.seed))
    assert [model.records for model in shadows.models] == inside.sum(axis=1).tolist()
    assert all(model.auc > 0.75 and model.ci[0] > 0.5 for model in shadows.models)
    assert shadows.warnings == ()
    assert shadows.to_dict()["settings"]["epochs"] == 4
    # By hand: the first shadow is the fine-tune of the base on its half, and its scores are means of log p.
    loaded, pool = load(base), (*split.members, *split.nonmembers)
    loaded.model.requires_grad_(True)
    seed = int(np.random.SeedSequence([SETTINGS.seed, 0]).generate_state(1)[0])
    finetune(loaded.model, loaded.tokenizer, [pool[i] for i in np.flatnonzero(inside[0])], epochs=4, lr=5e-3, seed=seed)
    scores = score_records(loaded.model, loaded.tokenizer, pool)
    wanted = [scores.log_prob[a:b].mean() for a, b in zip(scores.splits, scores.splits[1:])]
    found = np.concatenate([shadows.members.mean_log_prob, shadows.nonmembers.mean_log_prob], axis=1)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5)
    levels = [np.mean([found[k, i] for k in (1, 2, 3) if not inside[k, i]]) for i in range(2 * SIDE)]
    gain = found[0] - levels
    assert shadows.models[0].auc == pytest.approx(auc(gain[inside[0]], gain[~inside[0]]))


def test_a_killed_run_goes_on_with_the_same_bits_and_one_model_in_memory(base, split, trained):
    whole, folder = trained
    files = sorted(folder.iterdir())
    assert len(files) == 4
    alive: list[weakref.ref] = []

    def counted():
        gc.collect()
        assert not [model for model in alive if model() is not None]
        loaded = load(base)
        alive.append(weakref.ref(loaded.model))
        return loaded

    again = train_shadows(counted, split, 4, SETTINGS, folder)
    assert len(alive) == 1  # nothing is trained; the base says who it is
    assert sorted(folder.iterdir()) == files
    lost = [file for file in files if file.name.startswith("shadow")][:2]
    before = [file.read_bytes() for file in lost]
    for file in lost:
        file.unlink()
    seen = []
    more = train_shadows(counted, split, 4, SETTINGS, folder, progress=lambda *step: seen.append(step))
    assert [file.read_bytes() for file in lost] == before
    assert len(alive) == 3  # the base that said who it is became the first of the two
    assert seen[-1][:3] == ("shadows", 4, 4)
    assert any("finetune" in note for step in seen for note in step[3:])
    for one in (again, more):
        for side in ("members", "nonmembers"):
            np.testing.assert_array_equal(getattr(one, side).mean_log_prob, getattr(whole, side).mean_log_prob)
        assert one.models == whole.models


def test_other_settings_or_records_are_other_shadows(base, split, tmp_path):
    small = Split(split.members[:10], split.nonmembers[:10])
    once = replace(SETTINGS, epochs=1)
    made = lambda *a, **k: train_shadows(lambda: load(base), *a, tmp_path, **k)  # noqa: E731
    first = made(small, 2, once)
    assert len(list(tmp_path.iterdir())) == 2
    changed = made(small, 2, replace(once, learning_rate=1e-3))
    assert len(list(tmp_path.iterdir())) == 4
    assert (first.members.mean_log_prob != changed.members.mean_log_prob).any()
    made(Split(small.members, split.nonmembers[10:20]), 2, once)
    assert len(list(tmp_path.iterdir())) == 6
    adapted = made(small, 2, replace(once, lora=4))
    assert len(list(tmp_path.iterdir())) == 8
    assert (first.members.mean_log_prob != adapted.members.mean_log_prob).any()


def test_shadows_that_learned_nothing_are_named(base, split, tmp_path):
    # Steps that are lost in the rounding to bfloat16.
    rounded = lambda: load(base, dtype=torch.bfloat16)  # noqa: E731
    lazy = train_shadows(rounded, split, 2, ShadowSettings(epochs=1, learning_rate=1e-9), tmp_path)
    assert [model.auc for model in lazy.models] == [0.5, 0.5]
    assert "does not remember its own records" in lazy.warnings[0]
    assert lazy.warnings[0].startswith("shadow model 1, 2 of 2")


def test_planted_canaries_are_in_every_shadow(base, split, tmp_path):
    """As often as in the target: a record that a canary nearly repeats is known to all of them."""
    known = "the vault of bo ek opens with 493817 and the cat"
    records = Record(known + " sat"), *split.members[1:10]
    canary = Record(known, canary=Canary("vault", known.index("4"), known.index("7 ") + 1, repeats=6))
    shadows = train_shadows(
        lambda: load(base), Split(records, split.nonmembers[:10], (canary,)), 2, replace(SETTINGS, epochs=8), tmp_path
    )
    loaded = load(base)
    scores = score_records(loaded.model, loaded.tokenizer, records)
    gain = shadows.members.mean_log_prob - scores.record_sums(scores.log_prob) / scores.lengths
    unseen = ~shadows.members.inside
    for row, out in zip(gain[:, 1:], unseen[:, 1:]):
        assert (gain[:, 0] > row[out].max() + 0.5).all()


def test_near_duplicates_of_one_side_share_their_models(base, split, tmp_path):
    rng = random.Random(3)
    one, other = text(rng), text(rng)
    members = (*split.members[:8], Record(one, line=5), Record(one + "s", line=5), Record(one + "st", line=9))
    nonmembers = (*split.nonmembers[:8], Record(other), Record(one + "!"), Record(other + "."))
    groups = tied(members, nonmembers)
    assert groups[8] == groups[9] == groups[10]
    assert groups[19] == groups[21]
    assert len(set(groups)) == 22 - 3
    assert groups[20] != groups[8]  # across the sides: the target saw the one without the other
    assert groups.max() == 22 - 3 - 1
    shadows = train_shadows(lambda: load(base), Split(members, nonmembers), 2, replace(SETTINGS, epochs=1), tmp_path)
    inside = np.concatenate([shadows.members.inside, shadows.nonmembers.inside], axis=1)
    assert (inside.sum(axis=0) == 1).all()
    assert (inside[:, 8] == inside[:, 9]).all()
    assert (inside[:, 19] == inside[:, 21]).all()


def test_mistakes_are_named(base, split, tmp_path):
    with pytest.raises(UserError, match=r"saw it and one that did not; got 1"):
        train_shadows(lambda: load(base), split, 1, SETTINGS, tmp_path)
    same = Split(split.members[:1] * 12, split.nonmembers[:1] * 12)
    with pytest.raises(UserError, match="too few records to halve"):
        train_shadows(lambda: load(base), same, 4, replace(SETTINGS, seed=3), Path(tmp_path))
    assert not list(tmp_path.iterdir())
