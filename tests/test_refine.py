"""Learned rounding: the hinge by hand, gradients against autograd of the whole model, codes in their box, and what
becomes of a model that had learned records by heart."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.grid import Grid
from geoquant.methods.problem import Problem, Solution
from geoquant.methods.rtn import solve
from geoquant.model.vocabulary import ends
from geoquant.model.walk import read_weight
from geoquant.observe.backward import backward
from geoquant.privacy.refine import Material, RefineSettings, State, refine, texts_of
from geoquant.privacy.refine.hinge import hinge, levels, two_sided
from geoquant.privacy.refine.latent import begun, learned, moved, offsets_of, slope_squared, step_sizes
from geoquant.privacy.refine.losses import Losses, Objective
from geoquant.privacy.refine.reach import Reach
from geoquant.privacy.refine.vocabulary import VocabularyGradient
from refine_toy import RECORDS, rounded, toy

# Multiples of 2^-10: float32 halves and adds them exactly, and none is so small that a product of it is zero.
gaps = st.lists(st.integers(-3072, 3072), min_size=2, max_size=20).map(lambda some: torch.tensor(some) / 1024)


def head():
    return toy().tuned.get_output_embeddings().weight.detach()


def wanted(stage):
    return torch.cat([read_weight(toy().tuned.get_submodule(site.name)) for site in stage.sites])


def losses_of(model, material) -> Losses:
    """By plain forward passes of the whole model; the weights of the objective are one."""
    found, total, count, gap = {}, 0.0, 0, {}
    with torch.no_grad():
        for name, text in material.texts.items():
            logits = model(text.tokens).logits[:, :-1]
            if name in material.states:
                known = (material.states[name].float() @ head().T)[:, :-1].log_softmax(-1)
                kl = torch.nn.functional.kl_div(logits.log_softmax(-1), known, log_target=True, reduction="sum").item()
                found[name], total, count = kl / logits[..., 0].numel(), total + kl, count + logits[..., 0].numel()
            if name in material.base:
                gap[name] = nll(logits, text.tokens) - material.base[name]
    privacy = hinge(gap["private"], levels(gap["private"], gap["domain"]))[0]
    means = {f"{name}_gap": one.mean().item() for name, one in gap.items()}
    attack = two_sided(gap["private"], gap["domain"])
    return Losses(total / count + privacy, **found, privacy=privacy, **means, attack=attack)


def nll(logits, tokens):
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").double().mean(1)


# ---- the hinge


def test_members_are_pulled_to_the_quantile_of_their_rank():
    domain = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert levels(torch.tensor([5.0, -1.0]), domain).tolist() == [3.0, 1.0]  # quantiles 3/4 and 1/4


@given(gaps, gaps)
@settings(max_examples=50, deadline=None)
def test_a_hinge_at_its_level_or_above_has_no_value_and_no_gradient(members, domain):
    level = levels(members, domain)
    for there in (level, level + 0.5):
        value, slopes = hinge(there, level)
        assert value == 0
        assert not slopes.any()
    value, slopes = hinge(members, level)
    assert not slopes[members >= level].any()
    assert (slopes[members < level] < 0).all()


@given(gaps, gaps)
@settings(max_examples=50, deadline=None)
def test_the_hinges_slopes_are_those_of_its_value(members, domain):
    level = levels(members, domain)
    leaf = members.double().requires_grad_()
    value = (level.double() - leaf).clamp_min(0).square().mean() / 2
    assert hinge(members.double(), level.double())[0] == pytest.approx(value.item())
    assert torch.allclose(hinge(members.double(), level.double())[1], torch.autograd.grad(value, leaf)[0])


@given(gaps)
@settings(max_examples=50, deadline=None)
def test_records_that_all_reached_their_levels_are_not_told_from_the_domains(domain):
    """And one level for all, the median, would be: whoever was above it stays, whoever was below stands on it."""
    members = domain - 4.0
    there = levels(members, domain)
    assert two_sided(there, domain) <= 0.5 / len(domain) + 1e-6


def test_one_level_for_all_would_give_members_away():
    """Members that hardly leaked: pulled to the domain's median they leak four times as much, the other way round."""
    domain = torch.linspace(-1, 1, 101)
    members = domain - 0.05
    one = torch.maximum(members, domain.median())
    each = torch.maximum(members, levels(members, domain))
    assert two_sided(each, domain) < 0.01 < two_sided(members, domain) < 0.03 < 0.1 < two_sided(one, domain)


def test_the_two_sided_attack_counts_pairs():
    found = two_sided(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert found == pytest.approx((3 + 1.5) / 6 - 0.5)


# ---- latents


def boxed(seed: int = 0, bits: int = 3, symmetric: bool = True) -> tuple[torch.Tensor, Solution]:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))
    return weight, solve(Problem(weight, torch.eye(20), grid=Grid(bits, 8, symmetric)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_latents_start_at_the_given_codes(symmetric):
    weight, solution = boxed(symmetric=symmetric)
    latent = begun(solution, weight)
    assert not offsets_of(latent, solution).any()
    # And tell on which side of the code the weight lies.
    away = (weight - solution.dequantize()) / step_sizes(solution)
    inside = away.abs() < 0.49
    assert inside.float().mean() > 0.8
    assert torch.allclose(latent.float()[inside], away[inside], atol=1e-3)
    assert not offsets_of(begun(solution), solution).any()


@given(st.integers(0, 99), st.sampled_from([2, 3, 8]), st.booleans(), st.floats(0.01, 5))
@settings(max_examples=40, deadline=None)
def test_no_code_leaves_its_box_or_goes_further_than_one_step(seed, bits, symmetric, rate):
    weight, solution = boxed(seed, bits, symmetric)
    latent = begun(solution, weight)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(4):
        learned(latent, solution, torch.randn(weight.shape, generator=generator) ** 3, rate)
    codes = moved(solution, offsets_of(latent, solution)).codes.int()
    assert (codes - solution.codes.int()).abs().max() <= 1
    assert codes.min() >= solution.grid.lowest
    assert codes.max() <= solution.grid.highest


def test_what_latents_say_is_what_the_weights_become():
    """Weights after a move differ by exactly one step where the latent crossed half a step."""
    weight, solution = boxed(3)
    latent = begun(solution, weight)
    learned(latent, solution, torch.ones_like(weight), 0.2)
    offsets = offsets_of(latent, solution)
    assert offsets.any()
    found = moved(solution, offsets).dequantize() - solution.dequantize()
    assert torch.allclose(found, offsets * step_sizes(solution), atol=1e-6)


def test_kept_columns_do_not_move():
    weight, solution = boxed()
    kept = Solution(
        **(vars(solution) | {"kept_index": torch.tensor([2, 7]), "kept_weight": weight[:, [2, 7]].bfloat16()})
    )
    latent = begun(kept, weight)
    learned(latent, kept, torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), 1.0)
    assert not offsets_of(latent, kept)[:, [2, 7]].any()
    assert offsets_of(latent, kept).any()


def test_on_a_quadratic_codes_move_to_where_their_weights_are_near():
    """Separable, curvature one, codes up to one step off: mean squared error 3/4 of a squared step. Straight-through
    settles on one of the two codes around each weight, the nearer one more often: 1/6. The nearest would be 1/12."""
    weight, solution = boxed(5, bits=8)
    shifts = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(0))
    shifts[solution.codes.int().abs() > 125] = 0
    off = moved(solution, shifts.to(torch.int8))
    latent, steps = begun(off, weight), step_sizes(off)

    def error() -> float:
        return ((moved(off, offsets_of(latent, off)).dequantize() - weight) / steps).square().mean().item()

    before = error()
    for turn in range(100):
        away = moved(off, offsets_of(latent, off)).dequantize() - weight
        learned(latent, off, away / steps.square(), 0.3 * (1 - turn / 100))
    assert before > 0.5
    assert error() < 0.25
    assert (moved(off, offsets_of(latent, off)).codes == solution.codes).float().mean() > 0.65


def test_an_update_goes_down_the_slope_in_steps():
    weight, solution = boxed(bits=8)
    latent = torch.zeros(weight.shape, dtype=torch.float32)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    slope = gradient * step_sizes(solution)
    assert slope_squared(solution, gradient) == pytest.approx(slope.square().sum().item())
    length = 0.01 / slope.std().item()
    learned(latent, solution, gradient, length)
    inside = solution.codes.int().abs() < 127
    assert torch.allclose(latent[inside], -length * slope[inside], rtol=1e-4)
    before = latent.clone()
    learned(latent, solution, torch.zeros_like(weight), length)
    assert torch.equal(latent, before)


def test_codes_far_from_their_weights_start_anywhere_in_their_step():
    """A solver leaves them there on purpose; at the edge of a step they would all move at the first push."""
    weight, solution = boxed(bits=8)
    far = moved(solution, torch.where(solution.codes.int().abs() < 125, 2, 0).to(torch.int8))
    assert torch.allclose(begun(far, weight).float(), begun(solution, weight).float(), atol=2e-3)


# ---- how far


@given(st.floats(0.01, 0.9), st.floats(0.1, 100), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_along_a_parabola_the_reach_finds_the_length_of_its_lowest_point(gain, height, curvature):
    """f(l) = height - l s + curvature l^2 / 2 with squared slope s: judged by what it won, the length ends within a
    factor of the best, which wins half of what it promises."""
    slope = 0.9 * (2 * height * curvature) ** 0.5  # so that f stays above zero
    reach, best = Reach(gain), slope / curvature
    for _ in range(40):
        length = reach.length(height, slope)
        reach = reach.judged(height, height - length * slope + curvature * length**2 / 2)
    assert 0.2 < reach.length(height, slope) / best < 2.5


@pytest.mark.parametrize("seed", [0, 1])
def test_an_update_that_is_taken_back_leaves_what_a_shorter_one_would(seed):
    """Also of latents that had gone beyond a step, and of codes at the edge of their box."""
    weight, solution = boxed(seed, bits=2)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) ** 3
    back, short = begun(solution, weight), begun(solution, weight)
    learned(back, solution, gradient, 10.0)
    assert (back.float().abs() > 1.5).any()
    learned(back, solution, gradient, 4.0 - 10.0)
    learned(short, solution, gradient, 4.0)
    near = (back.float() - short.float()).abs() <= 2e-3 * (1 + 10 * (gradient * step_sizes(solution)).abs())
    assert near.all()
    same = offsets_of(back, solution) == offsets_of(short, solution)
    assert same.float().mean() > 0.97  # but for latents at the very edge, in half precision


def test_an_objective_of_nothing_or_of_no_number_is_no_gain():
    for before, now in ((0.0, 0.0), (1.0, float("nan"))):
        assert Reach(0.4).judged(before, now).back


def test_what_did_harm_is_taken_back_and_a_shorter_update_tried():
    reach = Reach(0.4, slope=2.0, lengths={"a": 3.0})
    assert reach.undone("a") == 0
    harmed = reach.judged(1.0, 1.2)
    assert harmed.back
    assert harmed.gain < reach.gain
    assert (harmed.undone("a"), harmed.undone("b")) == (3.0, 0.0)
    assert Reach(0.2).length(1.0, 0.0) == 0


# ---- the objective


@pytest.mark.parametrize("kind", ["box", "lattice"])
def test_losses_and_gradients_are_those_of_the_whole_model(kind):
    model, *_ = rounded(kind)
    material, texts = toy().material, toy().material.texts
    expected = losses_of(model, material)
    vocabulary = VocabularyGradient(model, texts)
    objective = Objective(model, material, 1.0, 1.0, head=head(), head_gradient=vocabulary.head)
    found: dict[str, torch.Tensor] = {}

    def see(text, batch, site, x, g):
        found[site] = found.get(site, 0) + g.T @ x

    for _ in backward(model, toy().blocks, texts, see, losses=objective, entered=vocabulary.entered):
        pass
    for name, value in expected.to_dict().items():
        known = objective.found.to_dict()[name]
        assert known is None if value is None else known == pytest.approx(value, rel=1e-3, abs=1e-5), name

    model.requires_grad_(True)
    total = 0.0
    gap = {}
    for name, text in texts.items():
        logits = model(text.tokens).logits[:, :-1]
        if name in material.states:
            known = (material.states[name].float() @ head().T)[:, :-1].log_softmax(-1)
            kl = torch.nn.functional.kl_div(logits.log_softmax(-1), known, log_target=True, reduction="sum")
            total = total + kl / (2 * logits[..., 0].numel())
        if name in material.base:
            gap[name] = nll(logits, text.tokens) - material.base[name]
    level = levels(gap["private"].detach(), gap["domain"].detach())
    (total + (level - gap["private"]).clamp_min(0).square().mean() / 2).backward()
    own = model.get_input_embeddings().weight.grad
    assert (vocabulary.of(ends(rounded("lattice")[1])[0]) - own).norm() < 0.02 * own.norm()
    for site, gradient in found.items():
        grad = model.get_submodule(site).weight.grad
        # What enters a block is kept in bfloat16: 0.4% of every value.
        assert (gradient - grad).norm() < 0.03 * grad.norm(), site


# ---- whole models


@pytest.fixture(scope="module")
def refined():
    """Every run that the tests below look at, made once: model, start, result."""

    @torch.no_grad()
    def made(kind: str, privacy: float, passes: int = 14):
        key = kind, privacy, passes
        if key not in known:
            model, blocks, start = rounded(kind)
            first = {name: copy.deepcopy(solution) for name, solution in start.items()}
            chosen = RefineSettings(passes=passes, privacy=privacy)
            result = refine(model, blocks, start, toy().material, chosen, wanted=wanted, head=head())
            known[key] = model, first, result
        return known[key]

    known: dict = {}
    return made


@pytest.mark.parametrize("kind", ["box", "lattice"])
def test_without_privacy_the_divergence_falls_on_text_that_was_not_looked_at_too(refined, kind):
    model, _, result = refined(kind, 0.0)
    start = rounded(kind)[0]
    for material, factor in ((toy().material, 0.6), (toy().heldout, 0.8)):
        before, after = losses_of(start, material), losses_of(model, material)
        assert after.public < factor * before.public
        assert after.domain < factor * before.domain
    assert losses_of(start, toy().material).public == pytest.approx(result.history[0].public, rel=1e-3)
    assert losses_of(model, toy().material).public == pytest.approx(result.history[result.best].public, rel=1e-3)


@pytest.mark.parametrize("kind", ["box", "lattice"])
def test_private_records_rise_to_their_level_and_not_beyond(refined, kind):
    model, _, result = refined(kind, 1.0)
    before, after = losses_of(rounded(kind)[0], toy().material), losses_of(model, toy().material)
    assert before.attack > 0.45
    assert after.attack < before.attack / 2
    assert after.privacy < before.privacy / 5
    assert after.private_gap > before.private_gap + 0.3
    assert after.private_gap < after.domain_gap + 0.1
    assert result.best > 6


def test_more_passes_do_not_forget_more_than_strangers(refined):
    """From the level on nothing pulls: twice the passes leave the attack as near to chance."""
    model, *_ = refined("box", 1.0, 28)
    after = losses_of(model, toy().material)
    assert after.attack < 0.22
    assert after.private_gap < after.domain_gap + 0.1


@pytest.mark.parametrize("kind", ["box", "lattice"])
def test_refined_codes_are_at_most_one_step_away_and_in_the_model(refined, kind):
    model, start, result = refined(kind, 1.0)
    assert list(result) == list(start)
    share = [result.share_moved(name) for name in result]
    assert 0 < max(share) < 0.3
    _, blocks, _ = rounded(kind)
    for stage in (stage for block in blocks for stage in block.stages):
        now, then = result[stage.name], start[stage.name]
        assert (now.codes.int() - then.codes.int()).abs().max() <= 1
        weight = torch.cat([read_weight(model.get_submodule(site.name)) for site in stage.sites])
        assert torch.equal(weight, now.dequantize())


def test_the_start_is_among_the_candidates():
    """At an absurd rate every pass does harm: the codes that came are the codes that go."""
    model, blocks, start = rounded("box")
    before = [parameter.clone() for parameter in model.parameters()]
    chosen = RefineSettings(passes=1, privacy=0.0, gain=1e6)
    result = refine(model, blocks, start, toy().material, chosen, wanted=wanted, head=head())
    assert result.best == 0
    assert result.history[1].total > result.history[0].total
    assert all(torch.equal(result[name].codes, start[name].codes) for name in start)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Stopped(Exception):
    pass


def test_an_interrupted_refinement_goes_on_to_the_same_codes(tmp_path):
    chosen = RefineSettings(passes=3)
    model, blocks, start = rounded("lattice")
    whole = refine(model, blocks, start, toy().material, chosen, wanted=wanted, head=head())
    state = State(tmp_path / "state.safetensors", "one")

    def stop(phase, done, total, note=""):
        if done == 3:  # in the second of three passes over two blocks
            raise Stopped

    model, blocks, start = rounded("lattice")
    with pytest.raises(Stopped):
        refine(model, blocks, start, toy().material, chosen, wanted=wanted, head=head(), state=state, progress=stop)
    model, blocks, start = rounded("lattice")
    again = refine(model, blocks, start, toy().material, chosen, wanted=None, head=head(), state=state)
    assert len(state.read()[2]) == 3
    assert again.history == whole.history
    assert all(torch.equal(again[name].codes, whole[name].codes) for name in whole)
    assert State(state.path, "another").read() is None


# ---- what is refused


def test_too_few_records_are_refused(tiny_tokenizer):
    from geoquant.data.records import Record
    from geoquant.data.text import Windows
    from geoquant.errors import UserError

    public = Windows(torch.zeros(2, 8, dtype=torch.int64), "text", "")
    some = [Record("abcdef")] * RECORDS
    assert isinstance(texts_of(tiny_tokenizer, public), Material)
    assert list(texts_of(tiny_tokenizer, public, some, some).texts) == ["public", "domain", "private"]
    with pytest.raises(UserError, match=r"too few of private.*got 0.*at least 4"):
        texts_of(tiny_tokenizer, public, some, [])
    with pytest.raises(UserError, match=r"too few of domain.*got 3"):
        texts_of(tiny_tokenizer, public, some[:3], some)


def test_settings_without_meaning_are_refused():
    for changes in ({"passes": 0}, {"gain": 0.0}, {"privacy": -1.0}):
        with pytest.raises(ValueError, match="at least one pass"):
            RefineSettings(**changes)
