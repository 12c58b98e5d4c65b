"""What spoils an audit without anybody noticing: copies, modes, infinities, marks that mark nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import geoquant
from conftest import make_tokenizer, tiny_llama
from geoquant.data.private import make_canaries, make_records
from geoquant.data.records import Canary, Record, Span, load_split
from geoquant.errors import UserError
from geoquant.model.modes import evaluating
from geoquant.privacy.audit import audit
from geoquant.privacy.coins import audit_coins
from geoquant.privacy.distribution import statistics
from geoquant.privacy.exposure import exact_exposure
from geoquant.privacy.finetune import finetune
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.scoring import score_split
from geoquant.privacy.shadows import ShadowSettings
from geoquant.privacy.statistics import roc_points
from geoquant.privacy.validity import check_sides
from geoquant.report.leakage import exposure_table

POOL = make_records(80, 3)
MEMBERS, NONMEMBERS = POOL[:40], POOL[40:]


def test_copies_of_a_record_are_no_further_evidence():
    """Every text 40 times made any model separate twelve records from twelve."""
    split = load_split(MEMBERS[:12] * 40, [*NONMEMBERS[:12] * 40, Record(f" {NONMEMBERS[0].text}\n")])
    assert split.members == tuple(MEMBERS[:12])
    assert split.nonmembers == tuple(NONMEMBERS[:12])
    assert any("937 records repeat another" in warning for warning in check_sides(split).warnings)
    scores = score_split(tiny_llama(), make_tokenizer(), split)
    (verdict,) = audit("original", scores, None, split).verdict()
    assert not verdict["separates"]
    with pytest.raises(UserError, match="too few members; got 1 records"):
        load_split(["the same"] * 50, NONMEMBERS)


def tossed(n: int, repeats: int = 1) -> list[Record]:
    coins = enumerate(make_canaries(n, 5, repeats=(repeats,)))
    return [replace(one, canary=replace(one.canary, included=i % 2 == 0)) for i, one in coins]


def test_a_canary_given_twice_is_refused():
    """Among the members and in a file of their own they were counted twice, and the bound on epsilon was void."""
    canaries = tossed(6)
    with pytest.raises(UserError, match="given twice"):
        load_split([*MEMBERS, *canaries], NONMEMBERS, canaries)
    both = replace(canaries[0], canary=replace(canaries[0].canary, included=False))
    with pytest.raises(UserError, match="given twice"):
        load_split(MEMBERS, NONMEMBERS, [*canaries, both])


@pytest.mark.parametrize(("repeats", "told"), [(1, False), (4, True)])
def test_the_bound_says_how_many_copies_a_coin_decides_about(repeats, told):
    split = load_split(MEMBERS, NONMEMBERS, tossed(8, repeats))
    bound = audit_coins(score_split(tiny_llama(), make_tokenizer(), split), None, split)
    assert ("one canary in or out of the input with all its copies, up to 4" in bound.covers) is told


@pytest.mark.parametrize(
    "record",
    [
        Record("Ann Lee", (Span("email", 3, 60),)),
        Record("Ann Lee", (Span("email", -3, 2),)),
        Record("code 123456", (), Canary("x", 5, 90)),
        Record("code abcdef", (), Canary("x", 5, 11)),
    ],
)
def test_marks_in_memory_are_checked_as_those_of_a_file(record):
    with pytest.raises(UserError, match=r"members: record 41 .*(outside|digits only)"):
        load_split([*MEMBERS, record], NONMEMBERS)


@pytest.mark.parametrize(
    ("models", "settings"),
    [(1, {}), (-3, {}), (2, {"epochs": 0}), (2, {"batch": 0}), (2, {"lora": -1}), (2, {"learning_rate": float("nan")})],
)
def test_impossible_shadows_are_refused_before_anything_is_scored(tiny_model_dir, tmp_path, models, settings):
    with pytest.raises(UserError, match="shadow"):
        geoquant.audit(
            tiny_model_dir, MEMBERS, NONMEMBERS, reference=tiny_model_dir, out=tmp_path / "audit",
            train_shadows=models, shadow_settings=ShadowSettings(**settings),
        )  # fmt: skip
    assert not (tmp_path / "audit").exists()


def test_a_model_is_left_in_the_modes_it_had():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    score_split(model, make_tokenizer(), load_split(MEMBERS, NONMEMBERS))
    assert [module.training for module in model.modules()] == before
    with evaluating(model):
        assert not any(module.training for module in model.modules())


def test_nothing_drops_out_while_a_rank_is_walked():
    model = tiny_llama(attention_dropout=0.9)
    (canary,) = make_canaries(1, 5, digits=3)
    bits = exact_exposure(model.eval(), make_tokenizer(), canary).bits
    assert {exact_exposure(model.train(), make_tokenizer(), canary).bits for _ in range(3)} == {bits}


def scores_of(log_prob: list[float], splits: list[int]) -> RecordScores:
    values = np.array(log_prob, np.float32)
    return RecordScores(*[values] * 5, np.arange(len(values)), np.arange(len(values)) + 1, np.array(splits))


def test_equal_records_have_equal_sums_wherever_they_stand():
    scores = scores_of([-0.1, -1.7] * 50 + [-np.inf, -1.0] + [-0.1, -1.7], [0, 0, *range(2, 105, 2), 104])
    sums = scores.record_sums(scores.log_prob)
    assert sums[0] == sums[-1] == 0
    assert len(set(sums[1:51])) == 1
    assert sums[51] == -np.inf
    assert sums[52] == sums[1]


def test_a_token_that_cannot_be_has_a_number():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    log_prob, *others = statistics(logits, torch.tensor([1]))
    assert all(torch.isfinite(part).all() for part in (log_prob, *others[:3]))
    assert log_prob < -1e5


def test_records_longer_than_the_context_are_trained_on_as_far_as_it_goes():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=304, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    assert finetune(model, make_tokenizer(), MEMBERS, epochs=1, lr=1e-3).steps == 5


def test_tokens_without_a_row_are_refused_and_such_padding_is_replaced():
    with pytest.raises(UserError, match="not this model's"):
        finetune(tiny_llama(vocab_size=200), make_tokenizer(), MEMBERS, epochs=1, lr=1e-3)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    assert tokenizer.pad_token_id == 259
    assert finetune(tiny_llama(vocab_size=259), tokenizer, MEMBERS, epochs=1, lr=1e-3).steps == 5


def test_a_place_that_cannot_be_written_is_noticed_before_training(tmp_path):
    from geoquant.finetuning import claim

    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        claim(tmp_path / "file" / "model")
    claim(tmp_path / "new" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_canaries_of_one_name_keep_their_rows():
    canary = {"name": "x", "repeats": 1, "bits": 3.0, "limit_bits": 19.9}
    row = {"subject": "original", "mean_bits": 3.0, "limit_bits": 19.9, "estimator": "digits-bound"}
    table = exposure_table({"exposure": [row | {"canaries": [canary, canary]}]}, {"original": "Original"})
    assert [name for name, *_ in table["rows"]] == ["x", "x (2)"]


def test_a_model_with_adapters_in_memory_is_audited_with_them():
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model, tokenizer = peft.get_peft_model(tiny_llama(), settings), make_tokenizer()
    wrapped = geoquant.audit(model, MEMBERS[:12], NONMEMBERS[:12], tokenizer=tokenizer)
    plain = geoquant.audit(tiny_llama(), MEMBERS[:12], NONMEMBERS[:12], tokenizer=tokenizer)
    merged = geoquant.audit(model.merge_and_unload(), MEMBERS[:12], NONMEMBERS[:12], tokenizer=tokenizer)
    aucs = [next(row["auc"] for row in one["attacks"] if row["name"] == "loss") for one in (wrapped, plain, merged)]
    assert aucs[0] == pytest.approx(aucs[2], abs=0.02)
    assert wrapped["models"]["original"]["sha256"] != plain["models"]["original"]["sha256"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_curve_of_records_without_tokens_is_drawn_in_silence():
    fpr, tpr = roc_points(np.array([-np.inf, -np.inf, 1.0]), np.array([-np.inf, 0.0, 0.5]))
    assert (fpr, tpr) == ([0.0, 0.0, 2 / 3, 1.0], [0.0, 1 / 3, 1 / 3, 1.0])
