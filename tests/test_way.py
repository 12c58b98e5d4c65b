"""Slopes along the way between two models: against finite differences, and their parts against the whole."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_llama
from geoquant.errors import UserError
from geoquant.observe.texts import Sequences
from geoquant.observe.way import slopes
from geoquant.plan.effects import anchoring
from oracles.models import build, tokens_for


def pair(name: str = "tied", size: float = 0.05):
    """A model, and its base: every parameter somewhere else."""
    model, generator = tiny_llama() if name == "tied" else build(name), torch.Generator().manual_seed(5)
    base = {
        key: own.detach() + size * (own.detach().std() + 0.1) * torch.randn(own.shape, generator=generator)
        for key, own in model.named_parameters()
    }
    return model, base


def text(rows: int = 4, length: int = 12) -> Sequences:
    tokens = tokens_for(rows, length)
    lengths = length - torch.arange(rows) % 5
    return Sequences(tokens.masked_fill(torch.arange(length) >= lengths[:, None], 0), lengths, batch=2)


def nll(model, state: dict, given: Sequences) -> float:
    """Mean loss per scored token, record by record, by plain torch."""
    model.load_state_dict(state, strict=False)
    total, count = 0.0, 0
    for tokens, length in zip(given.tokens, given.lengths):
        ids = tokens[:length][None]
        logits = model(ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += int(length) - 1
    return total / count


@pytest.mark.parametrize("name", ["tied", "gpt2", "gemma2"])
def test_losses_and_slopes_are_those_of_the_interpolated_model(name):
    model, base = pair(name, 0.4)
    own = {key: value.detach().clone() for key, value in model.named_parameters()}
    given, points = text(), (0.0, 0.4, 1.0)
    found = slopes(model, base.__getitem__, {"t": given}, points)
    scored = sum(found.scored["t"])
    assert scored == int((given.lengths - 1).sum())
    with torch.no_grad():
        for index, t in enumerate(points):
            at = [nll(model, {k: torch.lerp(base[k], own[k], t + h) for k in own}, given) for h in (-4e-3, 0, 4e-3)]
            assert found.losses["t"][index].sum().item() / scored == pytest.approx(at[1], rel=1e-5)
            slope = sum(part[index].sum().item() for part in found.parts["t"].values()) / scored
            assert slope == pytest.approx((at[2] - at[0]) / 8e-3, rel=2e-2, abs=5e-5)


def test_each_parameter_has_its_own_part_tied_ones_together():
    """The part of one parameter is the slope of moving that one alone."""
    model, base = pair(size=0.5)
    own = {key: value.detach().clone() for key, value in model.named_parameters()}
    given = text()
    found = slopes(model, base.__getitem__, {"t": given}, (1.0,))
    assert "lm_head.weight" not in found.parts["t"]  # tied: the embedding's part holds both its uses
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
            ends = [nll(model, own | {name: torch.lerp(base[name], own[name], 1.0 + h)}, given) for h in (-3e-3, 3e-3)]
            part = found.parts["t"][name][0].sum().item() / sum(found.scored["t"])
            assert part == pytest.approx((ends[1] - ends[0]) / 6e-3, rel=2e-2, abs=5e-5), name


def test_parts_of_all_parameters_add_up_to_the_whole_change():
    """Completeness, at every share; the quadrature's error falls with the square of the distance of points."""
    model, base = pair(size=0.4)
    given, missed = text(), []
    for count in (6, 24):
        points = tuple(torch.linspace(0, 1, count + 1, dtype=torch.float64).tolist())
        found = slopes(model, base.__getitem__, {"t": given}, points)
        change, _ = anchoring(found, list(base))
        whole = [
            (loss.sum() - found.losses["t"][-1].sum()).item() / sum(found.scored["t"]) for loss in found.losses["t"]
        ]
        assert change["t"][-1] == 0
        missed.append(max(abs(a - b) for a, b in zip(change["t"], whole)))
    assert abs(whole[0]) > 0.05
    assert missed[1] < missed[0] / 8  # a sixteenth, were the distances small already
    assert missed[1] < 0.02 * abs(whole[0])


def test_changes_add_over_units_and_what_did_not_move_has_none():
    model, base = pair()
    stays = "model.layers.0.mlp.up_proj.weight"
    base[stays] = dict(model.named_parameters())[stays].detach().clone()
    found = slopes(model, base.__getitem__, {"t": text(6)}, (0.0, 0.5, 1.0))
    assert stays not in found.parts["t"]
    names = list(base)
    whole, _ = anchoring(found, names)
    halves = [anchoring(found, part)[0]["t"] for part in (names[::2], names[1::2])]
    assert [a + b for a, b in zip(*halves)] == pytest.approx(list(whole["t"]), abs=1e-12)
    change, error = anchoring(found, [stays])
    assert change["t"] == (0, 0, 0) == error["t"]


def test_standard_errors_are_those_of_a_ratio_of_sums():
    """Against resampling the batches themselves."""
    model, base = pair()
    given = text(24, 30)
    found = slopes(model, base.__getitem__, {"t": given}, (0.0, 1.0))
    name = "model.layers.1.mlp.down_proj.weight"
    _, error = anchoring(found, [name])
    part, scored = found.parts["t"][name].sum(0) / 2, torch.tensor(found.scored["t"], dtype=torch.float64)
    assert len(scored) >= 6
    drawn = torch.randint(len(scored), (4000, len(scored)), generator=torch.Generator().manual_seed(0))
    resampled = part[drawn].sum(1) / scored[drawn].sum(1)
    # The bootstrap has n in place of n - 1.
    correction = (len(scored) / (len(scored) - 1)) ** 0.5
    assert error["t"][0] == pytest.approx(resampled.std().item() * correction, rel=0.1)


def test_the_model_is_left_as_it_was():
    model = tiny_llama().to(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    before = {name: (own.data_ptr(), own.dtype, own.requires_grad) for name, own in model.named_parameters()}
    steps = []
    slopes(
        model,
        lambda name: torch.zeros_like(dict(model.named_parameters())[name]),
        {"t": text()},
        (0.0, 1.0),
        progress=lambda phase, done, total, note="": steps.append((done, total)),
    )
    assert before == {name: (own.data_ptr(), own.dtype, own.requires_grad) for name, own in model.named_parameters()}
    assert all(own.grad is None for own in model.parameters())
    assert all("forward" not in vars(block) for block in model.model.layers)
    assert steps[-1][0] == steps[-1][1]


def test_another_model_is_no_base():
    model, base = pair()
    base["model.norm.weight"] = torch.ones(3)
    with pytest.raises(UserError, match=r"the base has another model\.norm\.weight; got shape \(3,\)"):
        slopes(model, base.__getitem__, {"t": text()}, (0.0, 1.0))


def test_losses_that_are_not_finite_are_refused():
    model, base = pair()
    base["model.norm.weight"] = torch.full_like(base["model.norm.weight"], torch.nan)
    with pytest.raises(UserError, match="the loss on t text is not finite on the way to the base"):
        slopes(model, base.__getitem__, {"t": text()}, (0.0, 1.0))
