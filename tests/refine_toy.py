"""A tiny model that has learned a language and then some of its sentences by heart, and rounded copies of it.

Sentences are walks on a fixed random graph of tokens, so that a model can know the language without knowing any of
them. `base` has read many walks, `tuned` went on with a few (`private`) until it knew these better than others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from conftest import tiny_llama
from geoquant.lattice.grid import Grid
from geoquant.methods.problem import LatticeSolution, Problem, Solution
from geoquant.methods.rtn import solve, solve_lattice
from geoquant.model.install import install
from geoquant.model.vocabulary import ends, vocabulary
from geoquant.model.walk import Block, read_weight, walk
from geoquant.observe.texts import padded
from geoquant.privacy.refine.material import Material, observe_base, observe_original

LENGTH, RECORDS = 24, 16


@dataclass(frozen=True)
class Toy:
    """material: for refinement. heldout: other public windows and records of the domain; private: other members.
    Do not change the models: `rounded` copies."""

    base: nn.Module
    tuned: nn.Module
    blocks: tuple[Block, ...]
    material: Material
    heldout: Material


def walks(count: int, seed: int) -> Tensor:
    """Sentences: every token has four successors with unequal odds."""
    successors = torch.randint(3, 60, (60, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 60, (count, LENGTH), generator=generator)
    for place in range(1, LENGTH):
        drawn = torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), count, replacement=True, generator=generator)
        tokens[:, place] = successors[tokens[:, place - 1], drawn]
    return tokens


@torch.enable_grad()  # whoever asks first may be without
def _train(model: nn.Module, tokens: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = tokens[torch.randperm(len(tokens), generator=generator)[:16]]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)


def _texts(public: Tensor, domain: Tensor, private: Tensor) -> Material:
    records = {"domain": padded(domain.tolist(), 1), "private": padded(private.tolist(), 1)}
    return Material({"public": padded(public.tolist(), 1), **records})


@cache
def toy() -> Toy:
    """Made once: two or three seconds."""
    base = tiny_llama(tie_word_embeddings=True, vocab_size=64)
    _train(base, walks(1000, 1), 120, 1e-2)
    private = walks(2 * RECORDS, 2)
    tuned = copy.deepcopy(base)
    _train(tuned, private, 25, 3e-3)
    base.eval(), tuned.eval()
    public, domain = walks(2 * RECORDS, 3), walks(2 * RECORDS, 4)
    sides = [
        _texts(*(part[half] for part in (public, domain, private))) for half in (slice(RECORDS), slice(RECORDS, None))
    ]
    seen = [observe_original(tuned, observe_base(base, side)) for side in sides]
    return Toy(base, tuned, walk(tuned, public[:1]), *seen)


def rounded(
    kind: str = "box", bits: int = 3
) -> tuple[nn.Module, tuple[Block, ...], dict[str, Solution | LatticeSolution]]:
    """A copy of the tuned model with every site rounded to nearest: in a box, or on the lattice with embeddings too."""
    model = copy.deepcopy(toy().tuned)
    blocks, solutions = toy().blocks, {}
    if kind == "lattice":
        blocks += (vocabulary(model, len(blocks)),)
    for stage in (stage for block in blocks for stage in block.stages):
        weight = torch.cat([read_weight(model.get_submodule(site.name)) for site in stage.sites])
        metric = torch.eye(weight.shape[1])
        if kind == "lattice":
            step = 0.4 if stage in ends(blocks) else 0.6
            solutions[stage.name] = solve_lattice(Problem(weight, metric, step=step * weight.std().item()))
        else:
            solutions[stage.name] = solve(Problem(weight, metric, grid=Grid(bits, 16)))
        install(model, stage, solutions[stage.name])
    return model, blocks, solutions
