"""A pass that starts where the last one stopped sees, to the last bit, what a pass from the beginning sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from geoquant.model.walk import read_weight, walk, write_weight
from geoquant.observe.compute import autocast, working_copy
from geoquant.observe.replay import Replay
from geoquant.observe.stream import BlockCall, open_stream
from oracles.models import ARCHITECTURES, build, tokens_for

WINDOWS, LENGTH = 6, 12


def play(name: str, compute: torch.dtype, *, replaying: bool):
    """Observe every stage of the second block, changing the weights after each; inputs, outputs, calls per module."""
    model, tokens = build(name), tokens_for(WINDOWS, LENGTH)
    block = walk(model, tokens[:1])[1]
    module = model.get_submodule(block.name)
    stream = open_stream(model, tokens, compute)
    batches = [hidden + 0.5 * hidden.roll(1, -1) for hidden in stream.batches]
    passes, seen, calls = Replay(stream.calls[1], batches), [], {}
    generator = torch.Generator().manual_seed(1)

    def count(work: nn.Module) -> nn.Module:
        for label, part in work.named_modules():
            part.register_forward_hook(lambda *_, label=label: calls.__setitem__(label, calls.get(label, 0) + 1))
        return work

    with autocast(torch.device("cpu"), compute):
        for stage in block.stages:
            site = stage.name.removeprefix(f"{block.name}.")
            keep = replaying and len(stage.sites) == 1
            work = count(working_copy(module, compute))
            passes.observe(work, site, lambda index, x: seen.append((stage.name, index, x.clone())), keep=keep)  # noqa: B023
            for part in stage.sites:
                weight = read_weight(model.get_submodule(part.name))
                write_weight(
                    model.get_submodule(part.name), weight + 0.1 * torch.randn(weight.shape, generator=generator)
                )
        outputs = list(passes.outputs(count(working_copy(module, compute))))
    assert not any("forward" in vars(part) for part in module.modules())  # nothing is left replaced
    return seen, outputs, calls


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replay_changes_no_bit(name, compute):
    seen, outputs, _ = play(name, compute, replaying=True)
    expected, expected_outputs, _ = play(name, compute, replaying=False)
    assert [entry[:2] for entry in seen] == [entry[:2] for entry in expected]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(seen, expected))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected_outputs))
    assert len(outputs) == WINDOWS // 2


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi"])
def test_a_block_is_computed_about_once(name):
    """Of three batches only the first runs again; the others multiply each site just once."""
    _, _, replayed = play(name, torch.bfloat16, replaying=True)
    _, _, plain = play(name, torch.bfloat16, replaying=False)
    first = "attn.c_attn" if name == "gpt2" else "self_attn.q_proj"
    batches = WINDOWS // 2
    # Reached by every pass but that of its own stage; in phi attention and MLP read one input, a stage less.
    assert plain[first] == batches * (3 if name == "phi" else 4)
    assert replayed[first] == batches + 1


class Tail(nn.Module):
    """A part whose last act may be something else than its linear map."""

    def __init__(self, act: str):
        super().__init__()
        self.line, self.act = nn.Linear(4, 4), act

    def forward(self, x):
        y = self.line(x)
        if self.act == "in place":
            y += x  # the same memory, another value
        if self.act == "state":
            return y, x
        return (y, None) if self.act == "tuple" else y * 2 if self.act == "scaled" else y


class Block(nn.Module):
    def __init__(self, act: str):
        super().__init__()
        self.part, self.last = Tail(act), nn.Linear(4, 4)

    def forward(self, x):
        y = self.part(x)
        return x + self.last(y[0] if isinstance(y, tuple) else y)


@pytest.mark.parametrize(
    ("act", "ends"), [("", True), ("tuple", True), ("in place", False), ("scaled", False), ("state", False)]
)
def test_only_a_submodule_that_returns_the_site_is_skipped(act, ends):
    torch.manual_seed(0)
    block, batches = Block(act), [torch.randn(2, 3, 4) for _ in range(3)]
    passes, seen, runs = Replay(BlockCall((), {}), batches), [], []
    passes.observe(block, "part.line", lambda *_: None, keep=True)
    block.part.line.weight.data.mul_(3)
    original = Tail.forward
    Tail.forward = lambda self, x: runs.append(1) or original(self, x)
    try:
        passes.observe(block, "last", lambda index, x: seen.append(x), keep=True)
    finally:
        Tail.forward = original
    assert len(runs) == (1 if ends else 3)
    for x, hidden in zip(seen, batches):
        y = block.part(hidden)
        assert torch.equal(x, (y[0] if isinstance(y, tuple) else y).detach().view(-1, 4))


class Sometimes(nn.Module):
    """An expert that only some batches reach, added to what another site wrote."""

    def __init__(self):
        super().__init__()
        self.down, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.down(x)
        return y + self.expert(x) if x.sum() > 0 else y


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Sometimes()

    def forward(self, x):
        return x + self.mlp(x)


def test_a_part_with_sites_still_to_come_is_not_skipped():
    """The first batch does not reach the expert: that it ends with `down` there proves nothing."""
    torch.manual_seed(0)
    block, batches = Routed(), [-torch.rand(2, 3, 4), torch.rand(2, 3, 4)]
    passes, seen = Replay(BlockCall((), {}), batches, waiting=frozenset({"mlp.down", "mlp.expert"})), []
    passes.observe(block, "mlp.down", lambda *_: None, keep=True)
    passes.waiting = frozenset({"mlp.expert"})
    passes.observe(block, "mlp.expert", lambda index, x: seen.append(index), keep=True)
    assert seen == [1]
    passes.waiting = frozenset()
    for found, hidden in zip(passes.outputs(block), batches):
        assert torch.equal(found, block(hidden).detach())


class Writes(nn.Module):
    """A block that writes to what a part returned, and to its own input."""

    def __init__(self):
        super().__init__()
        self.part, self.up, self.down = Tail(""), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        a = self.part(x)
        u = self.up(a)
        a += x
        x += a
        return x + self.down(u)


def test_writing_in_place_changes_nothing_that_is_kept():
    torch.manual_seed(0)
    block, batches = Writes(), [torch.randn(2, 3, 4) for _ in range(3)]
    before = [hidden.clone() for hidden in batches]
    passes = Replay(BlockCall((), {}), batches)
    for site in ("part.line", "up", "down"):
        passes.observe(block, site, lambda *_: None, keep=True)
    with torch.no_grad():
        for found, hidden in zip(passes.outputs(block), before):
            assert torch.equal(found, block(hidden.clone()))
    assert all(torch.equal(one, other) for one, other in zip(batches, before))


def test_a_site_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x):
            return self.line(input=x)

    seen, hidden = [], torch.randn(2, 3, 4)
    Replay(BlockCall((), {}), [hidden]).observe(Named(), "line", lambda _, x: seen.append(x), keep=False)
    assert torch.equal(seen[0], hidden.view(-1, 4))


def test_a_site_that_is_not_reached_shows_nothing():
    class Idle(Block):
        def forward(self, x):
            return self.part(x)

    passes, seen = Replay(BlockCall((), {}), [torch.randn(2, 3, 4)]), []
    passes.observe(Idle(""), "last", lambda *x: seen.append(x), keep=True)
    assert seen == []
    assert passes.last is None


def test_forgetting_starts_from_the_beginning():
    """After a change that was not observed, what was kept is wrong; `forget` drops it."""
    torch.manual_seed(0)
    block, batches = Block(""), [torch.randn(2, 3, 4) for _ in range(2)]
    passes = Replay(BlockCall((), {}), batches)
    passes.observe(block, "part.line", lambda *_: None, keep=True)
    passes.observe(block, "last", lambda *_: None, keep=True)
    block.part.line.weight.data.mul_(3)
    passes.forget()
    for found, hidden in zip(passes.outputs(block), batches):
        assert torch.equal(found, block(hidden).detach())
