"""The fine-tune: it learns its records, forgets less with public text, repeats itself exactly."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from geoquant.data.private import make_canaries, make_records
from geoquant.data.records import Record
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.privacy.finetune import _batches, _examples, _loss, _padded, finetune
from geoquant.privacy.scoring import score_records

RECORDS = [Record(text) for text in ("the cat sat", "a dog ran off", "birds", "some fish swim by")]


def loss(model, tokenizer, records) -> float:
    return -float(score_records(model, tokenizer, records).log_prob.mean())


def test_it_learns_the_records_and_leaves_evaluation_mode(tiny_model, tiny_tokenizer):
    before = loss(tiny_model, tiny_tokenizer, RECORDS)
    seen = []
    finetune(
        tiny_model,
        tiny_tokenizer,
        RECORDS,
        epochs=40,
        lr=1e-2,
        batch=2,
        progress=lambda *step: seen.append(step),
    )
    assert loss(tiny_model, tiny_tokenizer, RECORDS) < 0.2 * before
    assert not tiny_model.training
    assert [step[1] for step in seen] == list(range(1, 81))
    assert seen[-1][0] == "finetune"
    assert seen[-1][2] == 80


def test_same_seed_same_weights_other_seed_other_weights(tiny_model, tiny_tokenizer):
    def run(seed):
        model = copy.deepcopy(tiny_model)
        torch.rand(seed + 1)  # the caller's generator must not matter
        finetune(model, tiny_tokenizer, RECORDS, epochs=2, lr=1e-3, batch=1, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_the_callers_random_state_is_untouched(tiny_model, tiny_tokenizer):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=1, lr=1e-3)
    assert torch.equal(torch.rand(3), wanted)


def test_public_windows_keep_the_public_loss_down(tiny_model, tiny_tokenizer):
    public = [Record("ordinary text that everyone may read, again and again")]
    window = Windows(torch.tensor([tiny_tokenizer(public[0].text).input_ids]), "test", "")
    other = copy.deepcopy(tiny_model)
    finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=15, lr=1e-2, batch=2)
    finetune(other, tiny_tokenizer, RECORDS, epochs=15, lr=1e-2, batch=2, public_windows=window)
    assert loss(other, tiny_tokenizer, public) < 0.5 * loss(tiny_model, tiny_tokenizer, public)


def test_the_loss_is_the_mean_over_real_tokens_from_the_third_on(tiny_model, tiny_tokenizer):
    tokens, labels = _padded(_examples(tiny_model, tiny_tokenizer, RECORDS), padding=1)
    scores = score_records(tiny_model, tiny_tokenizer, RECORDS)
    scored = np.concatenate([scores.log_prob[a + 1 : b] for a, b in itertools.pairwise(scores.splits)])
    assert float(_loss(tiny_model, tokens, labels).detach()) == pytest.approx(-scored.mean(), rel=1e-5)


def test_repeats_count_and_every_example_is_seen_once_an_epoch(tiny_model, tiny_tokenizer):
    records = [*make_records(9, 0), *make_canaries(4, 1, repeats=(1, 4))]
    examples = _examples(tiny_model, tiny_tokenizer, records)
    assert len(examples) == 9 + 1 + 4 + 1 + 4
    batches = _batches([len(ids) for ids in examples], 4, torch.Generator().manual_seed(0))
    assert sorted(index for batch in batches for index in batch) == list(range(19))
    assert all(len(batch) <= 4 for batch in batches)


def test_nothing_to_learn_and_divergence_are_said(tiny_model, tiny_tokenizer):
    with pytest.raises(UserError, match="nothing to fine-tune on; got 0 records"):
        finetune(tiny_model, tiny_tokenizer, [], epochs=1, lr=1e-3)
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged at step 1"):
        finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=1, lr=1e-3)


# --- interruptions and early stops --------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_at(step):
    def progress(phase, done, total, note=""):
        if done == step:
            raise Killed

    return progress


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def dropping(model):
    """The same model with dropout in its attention, which draws from the global generator at every step."""
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_killed_at_any_step_goes_on_to_the_same_bits(lora, tiny_model, tiny_tokenizer, tmp_path):
    """Whatever was saved last; with dropout; killed twice on the way."""
    window = Windows(torch.tensor([tiny_tokenizer("ordinary text").input_ids]), "test", "")
    options = {"epochs": 4, "lr": 1e-2, "batch": 2, "seed": 3, "lora": lora, "public_windows": window}
    whole = dropping(copy.deepcopy(tiny_model))
    assert finetune(whole, tiny_tokenizer, RECORDS, **options).steps == 8
    calm = copy.deepcopy(tiny_model)
    finetune(calm, tiny_tokenizer, RECORDS, **options)
    assert not torch.equal(weights(calm), weights(whole))  # dropout was at work
    for every in (1, 3):
        for step in range(1, 9):
            path = tmp_path / f"{every}-{step}.safetensors"
            options |= {"checkpoint": path, "checkpoint_every": every}
            for kill in (step, min(step + 2, 8)):
                model = dropping(copy.deepcopy(tiny_model))
                with pytest.raises(Killed):
                    finetune(model, tiny_tokenizer, RECORDS, **options, progress=killed_at(kill))
            steps = []
            model = dropping(copy.deepcopy(tiny_model))
            torch.rand(step)  # the caller's generator must not matter
            note = lambda phase, done, *_, steps=steps: steps.append(done)  # noqa: E731
            done = finetune(model, tiny_tokenizer, RECORDS, **options, progress=note)
            assert torch.equal(weights(model), weights(whole)), (every, step)
            assert done.steps == done.planned == 8
            # The kill came before the checkpoint of its own step.
            assert steps[0] == (min(step + 2, 8) - 1) // every * every + 1


def test_a_killed_run_leaves_the_last_whole_checkpoint(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    options = {"epochs": 4, "lr": 1e-2, "batch": 2, "checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        finetune(copy.deepcopy(tiny_model), tiny_tokenizer, RECORDS, **options, progress=killed_at(4))
    before = path.read_bytes()

    def fails(*arguments, **others):
        raise OSError(5, "torn")

    with monkeypatch.context() as patch:
        patch.setattr("geoquant.runs.save_file", fails)
        with pytest.raises(OSError, match="torn"):
            finetune(copy.deepcopy(tiny_model), tiny_tokenizer, RECORDS, **options)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 2e-2}, r"was started with lr = 0\.01; got 0\.02"),
        ({"seed": 1}, r"was started with seed = 0; got 1"),
        ({"lora": 2}, r"was started with lora = 0; got 2"),
        ({"epochs": 5}, r"was started with epochs = 4; got 5"),
        ({"records": RECORDS[:3]}, r"the records changed since the training of .* was started; go on with the same"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(change, message, tiny_model, tiny_tokenizer, tmp_path):
    path = tmp_path / "state.safetensors"
    given = {"epochs": 4, "lr": 1e-2, "batch": 2, "seed": 0, "lora": 0, "checkpoint": path, "checkpoint_every": 1}
    with pytest.raises(Killed):
        finetune(copy.deepcopy(tiny_model), tiny_tokenizer, RECORDS, **given, progress=killed_at(3))
    given |= change
    with pytest.raises(UserError, match=message):
        finetune(copy.deepcopy(tiny_model), tiny_tokenizer, given.pop("records", RECORDS), **given)


def test_a_checkpoint_of_another_model_or_of_something_else_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    path = tmp_path / "state.safetensors"
    options = {"epochs": 4, "lr": 1e-2, "batch": 2, "checkpoint": path, "checkpoint_every": 1}
    with pytest.raises(Killed):
        finetune(copy.deepcopy(tiny_model), tiny_tokenizer, RECORDS, **options, progress=killed_at(3))
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    with pytest.raises(UserError, match="the model changed since the training of"):
        finetune(other, tiny_tokenizer, RECORDS, **options)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is no checkpoint of a fine-tune; delete it"):
        finetune(tiny_model, tiny_tokenizer, RECORDS, **options)
    path.write_bytes(b"half")
    with pytest.raises(UserError, match="cannot read"):
        finetune(tiny_model, tiny_tokenizer, RECORDS, **options)


@pytest.mark.parametrize("lora", [0, 2])
def test_what_stop_sees_is_what_a_training_that_ends_there_gives(lora, tiny_model, tiny_tokenizer):
    """At every look: the model alone, in its own type, bit for bit what the caller gets who stops there."""
    model = copy.deepcopy(tiny_model).bfloat16()
    options = {"epochs": 4, "lr": 1e-2, "batch": 2, "lora": lora, "stop_every": 3}
    seen = {}

    def look(step):
        assert not model.training
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        seen[step] = weights(model)
        torch.rand(7)  # a look may draw random numbers
        return False

    finetune(model, tiny_tokenizer, RECORDS, **options, stop=look)
    assert list(seen) == [3, 6, 8]
    assert torch.equal(seen[8], weights(model))
    unseen = copy.deepcopy(tiny_model).bfloat16()
    finetune(unseen, tiny_tokenizer, RECORDS, **options)
    assert torch.equal(weights(unseen), weights(model))
    for step in (3, 6):
        other = copy.deepcopy(tiny_model).bfloat16()
        done = finetune(other, tiny_tokenizer, RECORDS, **options, stop=lambda now, wanted=step: now >= wanted)
        assert (done.steps, done.planned) == (step, 8)
        assert torch.equal(seen[step], weights(other))


def test_an_error_on_the_way_leaves_an_ordinary_model(tiny_model, tiny_tokenizer):
    def fails(step):
        raise Killed

    with pytest.raises(Killed):
        finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=2, lr=1e-2, batch=2, lora=2, stop=fails, stop_every=2)
    assert not tiny_model.training
    assert not any(module._forward_hooks for module in tiny_model.modules())
    assert {weight.dtype for weight in tiny_model.parameters()} == {torch.float32}
    assert all(weight.requires_grad for weight in tiny_model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"cannot fine-tune with a learning rate of 0\.0; wanted a positive number"),
        ({"lr": float("nan")}, "a learning rate of nan"),
        ({"epochs": 0}, "nothing to fine-tune on; got 4 records, 0 epochs"),
        ({"batch": 0}, "cannot fine-tune with batch = 0; wanted a whole number from 1"),
        ({"stop_every": 0}, "cannot fine-tune with stop_every = 0"),
        ({"lora": -2}, "cannot make adapters of rank -2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message, tiny_model, tiny_tokenizer):
    with pytest.raises(UserError, match=message):
        finetune(tiny_model, tiny_tokenizer, RECORDS, **{"epochs": 1, "lr": 1e-3} | options)


def test_a_model_without_gradients_is_named(tiny_model, tiny_tokenizer):
    tiny_model.requires_grad_(False)
    with pytest.raises(UserError, match="no weight of the model requires a gradient"):
        finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=1, lr=1e-3)
    finetune(tiny_model, tiny_tokenizer, RECORDS, epochs=1, lr=1e-3, lora=1)
