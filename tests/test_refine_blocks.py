"""Refinement block by block: errors against plain forward passes, the slope against autograd, harm undone, going on."""

from __future__ import annotations

import pytest
import torch

from geoquant.model.walk import read_weight
from geoquant.privacy.refine import BlockState, RefineSettings, State, refine, refine_blocks
from geoquant.privacy.refine.latent import begun, moved, offsets_of, step_sizes
from refine_toy import rounded, toy


def wanted(stage):
    return torch.cat([read_weight(toy().tuned.get_submodule(site.name)) for site in stage.sites])


def outputs(model, tokens) -> list[torch.Tensor]:
    """What leaves each block in a plain forward pass."""
    seen = []
    handles = [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in model.model.layers]
    model(tokens)
    for handle in handles:
        handle.remove()
    return [out[0] if isinstance(out, tuple) else out for out in seen]


@torch.no_grad()
def errors_of(model, material) -> list[tuple[float, float]]:
    """Of every block: E_b, and the mean of tokens' own."""
    texts = [material.texts[name].tokens for name in ("public", "domain")]
    pairs = zip(*(zip(outputs(model, tokens), outputs(toy().tuned, tokens)) for tokens in texts))
    found = []
    for block in pairs:
        q, y = (torch.cat([pair[side].flatten(0, 1) for pair in block]).double() for side in (0, 1))
        squares, energies = (q - y).square().sum(1), y.square().sum(1)
        found.append(((squares.sum() / energies.sum()).item(), (squares / energies).mean().item()))
    return found


def run(kind="box", passes=6, **options):
    model, blocks, start = rounded(kind)
    given = {"wanted": wanted} | options
    latents, errors = refine_blocks(model, toy().tuned, blocks, start, toy().material.texts, passes, **given)
    return model, blocks, start, latents, errors


@pytest.mark.parametrize("kind", ["box", "lattice"])
def test_errors_are_those_of_plain_forward_passes_and_fall_on_other_text_too(kind):
    model, _, start, latents, errors = run(kind)
    first = rounded(kind)[0]
    before, after = errors_of(first, toy().material), errors_of(model, toy().material)
    for (_, found), expected in zip(errors, after, strict=True):
        assert (found.total, found.token) == pytest.approx(expected, rel=1e-3)
    assert (errors[0][0].total, errors[0][0].token) == pytest.approx(before[0], rel=1e-3)  # nothing before it moved
    for one, other in zip(before, after):
        assert other[0] < 0.8 * one[0]
    for one, other in zip(errors_of(first, toy().heldout), errors_of(model, toy().heldout)):
        assert other[0] < 0.9 * one[0]
    inner = [stage for block in toy().blocks for stage in block.stages]
    assert set(latents) == {stage.name for stage in inner}
    for stage in inner:
        found = moved(start[stage.name], offsets_of(latents[stage.name], start[stage.name]))
        assert (found.codes.int() - start[stage.name].codes.int()).abs().max() <= 1
        weight = torch.cat([read_weight(model.get_submodule(site.name)) for site in stage.sites])
        assert torch.equal(weight, found.dequantize())


def test_an_update_goes_down_the_slope_less_what_a_step_loses():
    """One update of the first block's feed-forward part, against autograd through the block on its own: slopes, and the
    whole derivative of every output by what each site puts out."""
    _, blocks, start, latents, _ = run(passes=1, gain=0.3)
    layer = rounded("box")[0].model.layers[0]
    model, mlp, seen = rounded("box")[0], layer.mlp, {}
    model.model.layers[0] = layer

    def seen_by(name):
        def keep(_, inputs, output):
            seen[name] = inputs[0], output

        return keep

    sites = {name: site for name, site in mlp.named_children() if hasattr(site, "weight")}
    handles = [site.register_forward_hook(seen_by(name)) for name, site in sites.items()]
    layer.requires_grad_(True)
    slopes, squares, energy = {}, {}, 0.0
    with torch.enable_grad():
        for text in ("public", "domain"):
            tokens = toy().material.texts[text].tokens
            with torch.no_grad():
                y = outputs(toy().tuned, tokens)[0]
            q = outputs(model, tokens)[0]
            energy += y.square().sum()
            (q - y).square().sum().backward(retain_graph=True)
            derivatives = dict.fromkeys(seen, 0.0)
            for place in range(q.shape[2]):
                one = torch.autograd.grad(q[..., place].sum(), [out for _, out in seen.values()], retain_graph=True)
                derivatives = {name: derivatives[name] + part.square() for name, part in zip(seen, one)}
            for name, (x, _) in seen.items():
                own = derivatives[name].flatten(0, 1).T @ x.detach().square().flatten(0, 1)
                squares[name] = squares.get(name, 0.0) + 2 * own
    for handle in handles:
        handle.remove()
    slopes = {name: getattr(mlp, name).weight.grad / energy for name in seen}
    for stage in blocks[0].stages[-2:]:
        names = [site.name.rpartition(".")[2] for site in stage.sites]
        steps = step_sizes(start[stage.name])
        slope, curvature = (torch.cat([side[name] for name in names]) for side in (slopes, squares))
        shrunk = slope.sign() * (slope.abs() - curvature / energy * steps.abs() / 2).clamp_min(0.0)
        went = latents[stage.name].float() - begun(start[stage.name], wanted(stage)).float()
        found = torch.corrcoef(torch.stack([went.flatten(), -(shrunk * steps).flatten()]))[0, 1]
        assert found > 0.99
        assert (shrunk == 0).float().mean() > 0.1  # it matters


def test_harm_is_undone():
    model, _, start, latents, errors = run(passes=1, gain=1e6)
    for before, after in errors:
        assert before == after
    assert not any(offsets_of(latents[name], start[name]).any() for name in latents)
    first = rounded("box")[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), model.parameters(), strict=True))


def test_private_records_are_not_looked_at():
    texts = {name: text for name, text in toy().material.texts.items() if name != "private"}
    model, blocks, start = rounded("box")
    errors = refine_blocks(model, toy().tuned, blocks, start, texts, 2, wanted=wanted)[1]
    assert errors == run(passes=2)[-1]


class Stopped(Exception):
    pass


def test_an_interrupted_one_goes_on_to_the_same_codes(tmp_path):
    def stop(phase, done, total, note=""):
        assert (phase, total) == ("refine blocks", 2)
        raise Stopped

    *_, whole, errors = run("lattice", 3)
    state = BlockState(tmp_path / "blocks", "one")
    with pytest.raises(Stopped):
        run("lattice", 3, state=state, progress=stop)
    assert len(list(state.folder.glob("*"))) == 1
    model, *_, again, found = run("lattice", 3, state=state)
    assert found == errors
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    # And one that is done is read, not made again.
    third, *_, read, found = run("lattice", 3, state=state, wanted=None)
    assert found == errors
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), third.parameters(), strict=True))
    assert BlockState(state.folder, "another").read(toy().blocks[0]) is None


# ---- the passes end to end that follow


def head():
    return toy().tuned.get_output_embeddings().weight.detach()


def test_passes_end_to_end_start_from_there(tmp_path):
    *_, latents, _ = run("box", 4)
    model, blocks, start = rounded("box")
    state = State(tmp_path / "state.safetensors", "one")
    chosen = RefineSettings(passes=4, privacy=0.0)
    found = refine(model, blocks, start, toy().material, chosen, wanted=wanted, head=head(), first=latents, state=state)
    solver, offered = found.tried
    assert offered.total < 0.9 * solver.total
    assert found.history[0] == offered
    assert found.history[found.best].total < offered.total
    for name in start:
        assert (found[name].codes.int() - start[name].codes.int()).abs().max() <= 1
    # It goes on from the file as it would have without.
    model, blocks, start = rounded("box")
    again = refine(model, blocks, start, toy().material, chosen, head=head(), first=latents, state=state)
    assert again.tried == found.tried
    assert all(torch.equal(again[name].codes, found[name].codes) for name in start)


def test_a_start_that_is_worse_than_the_solvers_is_not_taken():
    generator = torch.Generator().manual_seed(0)
    bad = {
        stage.name: torch.randn(stage.rows, stage.columns, generator=generator).half()
        for stage in toy().blocks[0].stages
    }
    chosen = RefineSettings(passes=1, privacy=0.0)
    model, blocks, start = rounded("box")
    found = refine(model, blocks, start, toy().material, chosen, wanted=wanted, head=head(), first=bad)
    model, blocks, start = rounded("box")
    plain = refine(model, blocks, start, toy().material, chosen, wanted=wanted, head=head())
    assert found.tried[1].total > found.tried[0].total
    assert found.history == plain.history
    assert all(torch.equal(found[name].codes, plain[name].codes) for name in start)
