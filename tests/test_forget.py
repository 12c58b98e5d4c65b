"""Forgetting: what becomes of a model that had learned records by heart, on these, on others and on public text."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.errors import UserError
from geoquant.evaluate.perplexity import head_logits
from geoquant.privacy.forget import LEVEL, ForgetSettings, forget, rounded_randomly
from geoquant.privacy.refine.material import observe_original, original_losses, record_losses
from refine_toy import toy

CHOSEN = ForgetSettings(passes=8, rate=1e-2)


@pytest.fixture(scope="module")
def forgetful():
    """The tuned toy after forgetting, and what was said of it."""
    model = copy.deepcopy(toy().tuned)
    return model, forget(model, toy().material, CHOSEN)


def gaps(model, material):
    """By plain forward passes of the whole model, all records of one length."""
    found = {}
    with torch.no_grad():
        for name, base in material.base.items():
            tokens = material.texts[name].tokens
            logits = model(tokens).logits[:, :-1].transpose(1, 2)
            nll = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").double().mean(1)
            found[name] = nll - base
    return found


def attack(found):
    lower = found["private"][:, None] < found["domain"]
    return lower.double().mean().item()


def divergence(model, material):
    """Of public text and the domain's records, in nats per predicted token."""
    total = count = 0
    with torch.no_grad():
        for name, states in material.states.items():
            tokens = material.texts[name].tokens
            known = head_logits(toy().tuned, states[:, :-1].flatten(0, 1).float()).log_softmax(1)
            own = model(tokens).logits[:, :-1].flatten(0, 1).log_softmax(1)
            total += torch.nn.functional.kl_div(own, known, log_target=True, reduction="sum").item()
            count += len(own)
    return total / count


def test_private_records_end_where_others_are_and_not_beyond(forgetful):
    model, said = forgetful
    before, after = gaps(toy().tuned, toy().material), gaps(model, toy().material)
    assert attack(before) > 0.95
    assert abs(attack(after) - 0.5) < 0.15
    assert after["private"].mean() < after["domain"].mean() + 0.1
    for name, known, found in (("before", said.before, before), ("after", said.after, after)):
        assert known.private_gap == pytest.approx(found["private"].mean().item(), abs=2e-3), name
        assert known.domain_gap == pytest.approx(found["domain"].mean().item(), abs=2e-3), name
        assert known.attack == pytest.approx(abs(attack(found) - 0.5), abs=0.01), name


def test_levels_may_be_those_of_records_that_nothing_else_is_measured_on():
    material, others = toy().material, toy().heldout
    texts, base = (
        {**own, LEVEL: its["domain"]} for own, its in ((material.texts, others.texts), (material.base, others.base))
    )
    model = copy.deepcopy(toy().tuned)
    said = forget(model, replace(material, texts=texts, base=base), CHOSEN)
    after = gaps(model, replace(material, texts=texts, base=base))
    assert said.after.level_gap == pytest.approx(gaps(model, others)["domain"].mean().item(), abs=2e-3)
    assert said.after.domain_gap == pytest.approx(after["domain"].mean().item(), abs=2e-3)
    lower = after["private"][:, None] < after[LEVEL]
    assert said.after.attack == pytest.approx(abs(lower.double().mean().item() - 0.5), abs=0.01)
    assert said.after.attack < 0.15


def test_the_function_stays_on_text_that_was_not_looked_at_too(forgetful):
    """Records that were not given are known no better than before: nothing new was learned of them."""
    model, said = forgetful
    assert said.divergence < 0.25
    assert divergence(model, toy().material) < 0.25
    before, after = gaps(toy().tuned, toy().heldout), gaps(model, toy().heldout)
    assert abs(after["domain"].mean() - before["domain"].mean()) < 0.2
    assert after["private"].mean() > before["private"].mean() - 0.02


def test_more_passes_do_not_make_private_records_less_known_than_others():
    model = copy.deepcopy(toy().tuned)
    said = forget(model, toy().material, replace(CHOSEN, passes=12))
    assert said.after.private_gap < said.after.domain_gap + 0.1
    assert said.after.attack < 0.15


def test_a_model_that_knows_its_records_no_better_stays_as_it_is():
    model = copy.deepcopy(toy().tuned)
    material = toy().material
    far = record_losses(model, material.texts["private"]) - 5.0  # the base knew them all far better
    said = forget(model, replace(material, base={**material.base, "private": far}), CHOSEN)
    assert said.before.privacy == said.divergence == said.made == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), toy().tuned.parameters(), strict=True))


def test_the_same_seed_gives_the_same_weights_and_the_types_stay():
    models = []
    for _ in range(2):
        model = copy.deepcopy(toy().tuned).bfloat16().requires_grad_(False)
        forget(model, toy().material, replace(CHOSEN, passes=1))
        models.append(model)
    first, second = ([*model.parameters()] for model in models)
    assert all(own.dtype == torch.bfloat16 and not own.requires_grad and own.grad is None for own in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b.bfloat16()) for a, b in zip(first, toy().tuned.parameters(), strict=True))
    head, embedding = models[0].get_output_embeddings(), models[0].get_input_embeddings()
    assert head.weight is embedding.weight


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_what_was_stopped_ends_at_the_same_weights(steps, anchored):
    """In the middle of a pass, at its end, after the last step; with levels that are renewed between passes."""
    material, others = toy().material, toy().heldout
    texts, base = (
        {**own, LEVEL: its["domain"]} for own, its in ((material.texts, others.texts), (material.base, others.base))
    )
    material, asked = replace(material, texts=texts, base=base), replace(CHOSEN, passes=3)
    head = toy().tuned.get_output_embeddings().weight.detach() if anchored else None
    stood = []
    whole, model = copy.deepcopy(toy().tuned), copy.deepcopy(toy().tuned)
    said = forget(whole, material, asked, original=head, keep=lambda own: stood.append(copy.deepcopy(own)))
    assert [own.facts["steps"] for own in stood] == [1, 2, 3, 4, 5, 6]
    later = []
    half = stood[steps - 1]
    again = forget(
        model, material, asked, original=head, halfway=half, keep=lambda own: later.append(own.facts["steps"])
    )
    assert later == [*range(steps + 1, 7)]
    assert again == said
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_a_head_with_a_bias_keeps_it():
    """The given model's logits are made with it too: it must not move under them."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    model = PhiForCausalLM(PhiConfig(**size, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64))
    model.lm_head.bias.data.normal_()
    model = model.bfloat16().eval()
    before = [model.lm_head.bias.detach().clone(), model.lm_head.weight.detach().clone()]
    material = observe_original(model, replace(toy().material, states={}))
    base = {name: own + 1.0 for name, own in material.base.items() if name == "private"} | {
        "domain": -toy().material.base["domain"]
    }
    said = forget(model, replace(material, base=base), replace(CHOSEN, passes=1))
    assert said.made == 1
    assert torch.equal(model.lm_head.bias, before[0])
    assert not torch.equal(model.lm_head.weight, before[1])


def test_the_originals_losses_follow_from_its_states():
    material, model = toy().material, toy().tuned
    head = model.get_output_embeddings().weight.detach()
    truth = gaps(model, material)["domain"] + material.base["domain"]
    found = original_losses(toy().base, material, "domain", head)
    assert torch.allclose(found, truth, atol=1e-3)  # states are kept in 16 bits


@pytest.mark.parametrize("back", [0.8, 1.0])
def test_function_that_another_lever_took_comes_back_from_the_original(back):
    """Most of the way to the base costs function; what was known by heart does not come back with it."""
    model, material = copy.deepcopy(toy().tuned), toy().material
    with torch.no_grad():
        for own, its in zip(model.parameters(), toy().base.parameters(), strict=True):
            own.lerp_(its, back)
    lost = divergence(model, material)
    forget(model, material, CHOSEN, original=toy().tuned.get_output_embeddings().weight)
    assert divergence(model, material) < 0.7 * lost
    assert abs(attack(gaps(model, material)) - 0.5) < 0.15


def test_losses_without_a_value_are_told():
    model = copy.deepcopy(toy().tuned)
    material = toy().material
    lost = {**material.base, "private": material.base["private"] * float("nan")}
    before = [own.clone() for own in model.parameters()]
    with pytest.raises(UserError, match="not finite while forgetting"):
        forget(model, replace(material, base=lost), CHOSEN)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_settings_without_meaning_are_refused():
    for changes in ({"passes": 0}, {"rate": 0.0}, {"weight": -1.0}):
        with pytest.raises(ValueError, match="at least one pass"):
            ForgetSettings(**changes)


# ---- rounding at random


@given(st.floats(-(2.0**90), 2.0**90, width=32), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_values_go_to_one_of_their_two_neighbours(value, seed):
    values = torch.full((50,), value)
    found = rounded_randomly(values, torch.bfloat16, torch.Generator().manual_seed(seed)).float()
    near = values.bfloat16().float()
    spacing = max(abs(near[0].item()) * 2**-7, 2**-133)
    assert (found - values).abs().max() <= spacing
    if torch.equal(near, values):
        assert torch.equal(found, values)


def test_the_mean_is_the_value_itself():
    """A third of the way between two neighbours: up one time in three (binomial, six standard errors)."""
    low, high = 1.0, 1.0 + 2**-7
    values = torch.full((30_000,), low + (high - low) / 3)
    found = rounded_randomly(values, torch.bfloat16, torch.Generator().manual_seed(0)).float()
    assert set(found.tolist()) == {low, high}
    assert (found == high).float().mean().item() == pytest.approx(1 / 3, abs=6 * (2 / 9 / 30_000) ** 0.5)


def test_other_types_get_the_nearest_and_what_has_no_value_keeps_none():
    values = torch.tensor([0.1, float("inf"), float("nan"), -float("inf")])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(rounded_randomly(values, torch.float32, generator)[:2], values[:2])
    assert torch.equal(rounded_randomly(values, torch.float16, generator)[:1], values[:1].half())
    lost = rounded_randomly(values, torch.bfloat16, generator)
    assert torch.equal(lost.isfinite(), torch.tensor([True, False, False, False]))
    assert lost[2].isnan()
