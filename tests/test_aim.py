"""What each group of weights taught: sums against loops, completeness against losses, and planted memories found."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_llama
from geoquant.observe.texts import Sequences, padded
from geoquant.privacy.aim import gathered, goes_back, spread_over, taught
from geoquant.privacy.anchor import anchored
from planted_toy import DIALECT, LOWER, encode, make_base, plant, write

SHAPES = st.sampled_from([(5,), (3, 8), (3, 10), (2, 3, 7), (4, 1)])


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 9), st.integers(0, 10**6))
def test_groups_are_neighbours_of_one_row(shape, size, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    truth = [values.sum().item()]
    if len(shape) > 1:
        rows = values.reshape(-1, shape[-1]).tolist()
        truth = [sum(row[start : start + size]) for row in rows for start in range(0, shape[-1], size)]
    assert torch.allclose(gathered(values, size), torch.tensor(truth, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 9))
def test_every_weight_gets_its_groups_value(shape, size):
    numbers = torch.arange(len(gathered(torch.zeros(shape), size)), dtype=torch.float64)
    wide = spread_over(numbers, shape, size)
    assert wide.shape == shape
    counts = gathered(torch.ones(shape, dtype=torch.float64), size)
    assert torch.equal(gathered(wide.contiguous(), size), numbers * counts)


def test_the_rule():
    taught_by = {
        "private": [2.0, 2.0, 1.0, -1.0, 2.0],
        "domain": [0.9, 1.0, 0.9, -0.6, 0.9],
        "public": [0, 0, -9, 0, 0.2],
    }
    values = {text: torch.tensor(own) for text, own in taught_by.items()}
    assert goes_back(values, 0.5).tolist() == [True, False, False, True, False]
    assert goes_back(values, 1.0).tolist() == [True, True, True, False, True]
    for strength in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"strength {strength:g}"):
            goes_back(values, strength)


def nll(model, text: Sequences) -> float:
    """Mean loss per token, by plain torch."""
    total = count = 0.0
    for tokens, length in zip(text.tokens, text.lengths):
        ids = tokens[:length][None]
        logits = model(ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += int(length) - 1
    return total / count


def test_the_parts_add_up_to_the_fall_of_each_loss():
    """Two points of the way leave an error of the fifth derivative of the loss: little on a short way."""
    model, base = tiny_llama(), tiny_llama()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for own in model.parameters():
            own += 0.01 * torch.randn(own.shape, generator=generator)
    texts = {
        name: padded(torch.randint(3, 300, (4, 20), generator=generator).tolist(), 0) for name in ("private", "public")
    }
    before = {name: own.clone() for name, own in model.named_parameters()}
    found = taught(model, dict(base.named_parameters()).__getitem__, texts, size=10)
    for name, text in texts.items():
        whole = sum(values.sum().item() for values in found[name].values())
        truth = nll(base, text) - nll(model, text)
        assert whole == pytest.approx(truth, rel=0.02)
        assert found[name].keys() == before.keys()
    assert all(torch.equal(own, before[name]) for name, own in model.named_parameters())


# ---- planted memories


@pytest.fixture(scope="module")
def languages():
    return make_base()


def records(texts) -> Sequences:
    return padded([ids.tolist() for ids in encode(list(texts))], 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_memories_go_back_and_function_stays(languages, seed):
    """One block of columns holds records, another a dialect and what records have in common, each trained alone there.
    Half of the records and half of the strangers choose; the others judge: interpolation that takes as much of the
    memory takes many times more of the function.
    """
    planted = plant(languages, seed)
    model, material = planted.model, planted.material
    members, strangers = ([one.text for one in side] for side in (material.members, material.nonmembers))
    dialect = encode(write(DIALECT, LOWER, 24, 24, 77)).tolist()
    texts = {"private": records(members[::2]), "domain": records(strangers[::2]), "public": padded(dialect[::2], 0)}
    theirs = {name: own.detach() for name, own in languages.named_parameters()}
    found = taught(model, theirs.__getitem__, texts, size=64)
    shares = {}
    for name, own in model.named_parameters():
        back = goes_back({text: found[text][name] for text in texts}, 0.5)
        shares[name] = spread_over((~back).float(), tuple(own.shape), 64)
    roles = {role: [] for role in ("functional", "sensitive")}
    for part, role in planted.parts:
        if role in roles:
            change = (model.get_submodule(part.site).weight - theirs[f"{part.site}.weight"])[:, part.columns]
            kept = shares[f"{part.site}.weight"][:, part.columns]
            roles[role].append(((kept * change.square()).sum() / change.square().sum()).item())
    kept = {role: np.mean(values) for role, values in roles.items()}
    assert kept["functional"] > 0.9, kept
    assert kept["sensitive"] < 0.65, kept

    held_out = padded(dialect[1::2], 0)
    judges = {"seen": texts["private"], "unseen": records(members[1::2]), "function": held_out}
    start = {name: nll(model, text) for name, text in judges.items()}

    def after(share) -> dict[str, float]:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, own in other.named_parameters():
                own.copy_(anchored(own, theirs[name], share(name)))
        return {name: nll(other, text) - start[name] for name, text in judges.items()}

    aimed = after(shares.__getitem__)
    between = [after(lambda _, m=m: m) for m in np.linspace(0, 1, 9)]
    alike = min((one for one in between if one["seen"] >= aimed["seen"]), key=lambda one: one["function"])
    assert aimed["unseen"] > 0
    assert aimed["function"] < 0.5 * alike["function"], (aimed, alike)
