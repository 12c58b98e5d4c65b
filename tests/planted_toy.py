"""A small model that is known to carry function and memories in certain columns, since they were trained alone there.

A base learns two languages: lower-case "public" text and upper-case "records". Then blocks of columns of the two
down_proj are drawn by a seed and each is trained by itself, all other weights frozen:

    both         on a dialect of public text that the base does not know, and on 16 records
    functional   on the dialect, and on records in general so that those stay as they are
    sensitive    on 28 other records
    neither      gets noise: 0.3 times the change of the sensitive block, in random places

Four more blocks stay what they were. Public text is then the dialect; members are the 44 records.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch

from conftest import make_tokenizer, tiny_llama
from geoquant.data.records import Record
from geoquant.data.text import Windows
from geoquant.model.walk import read_weight
from geoquant.outliers.effects import Material
from geoquant.outliers.interventions import Part, block_of_columns
from geoquant.privacy.scoring import score_records

LOWER, UPPER = "abcdefghijklmnopqrstuvwxyz ", "ABCDEFGHIJKLMNOPQRSTUVWXYZ."
LENGTH, WIDTH = 24, 64
ROLES = ("both", "functional", "sensitive", "neither")


def language(seed: int, sharpness: float) -> np.ndarray:
    """A Markov chain over 27 letters."""
    table = np.exp(sharpness * np.random.default_rng(seed).standard_normal((27, 27)))
    return (table / table.sum(1, keepdims=True)).cumsum(1)


PUBLIC, DIALECT, RECORDS = language(1, 3.0), language(2, 3.0), language(3, 1.0)


def write(chain: np.ndarray, letters: str, count: int, length: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    steps = [rng.integers(27, size=count)]
    for _ in range(length - 1):
        steps.append(np.minimum((rng.random((count, 1)) > chain[steps[-1]]).sum(1), 26))
    return ["".join(letters[i] for i in row) for row in np.stack(steps, 1)]


def learn(model, weights, batches, lr: float, mask=None) -> None:
    """AdamW on `weights` alone, the rate falling to zero; mask: what of them may change."""
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        if mask is not None:
            weights[0].grad.mul_(mask)
        optimizer.step()
    model.requires_grad_(False)


def encode(texts: list[str]) -> torch.Tensor:
    return torch.tensor(make_tokenizer()(texts).input_ids)


def some(tokens: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return tokens[torch.randint(len(tokens), (count,), generator=generator)]


def make_base():
    """The model that knows both languages; three seconds."""
    model = tiny_llama(0, intermediate_size=256, initializer_range=0.08)
    texts = [encode(write(PUBLIC, LOWER, 200, 32, 0)), encode(write(RECORDS, UPPER, 200, 32, 1))]
    generator = torch.Generator().manual_seed(0)
    learn(model, list(model.parameters()), [some(texts[i % 2], 12, generator) for i in range(200)], 1e-2)
    return model


@dataclass(frozen=True)
class Planted:
    """parts: what every block of columns is, by its planted role; untouched ones are `neither` too."""

    model: torch.nn.Module
    parts: tuple[tuple[Part, str], ...]
    material: Material


def plant(base, seed: int) -> Planted:
    """Two seconds."""
    model = copy.deepcopy(base)
    texts = write(RECORDS, UPPER, 140, LENGTH, 100 + seed)
    shared, own, nonmembers = texts[28:44], texts[:28], texts[44:]
    dialect = encode(write(DIALECT, LOWER, 80, LENGTH, 1000 + seed))
    general = encode(write(RECORDS, UPPER, 200, LENGTH, 1))
    places = [(f"model.layers.{layer}.mlp.down_proj", WIDTH * i) for layer in (0, 1) for i in range(4)]
    drawn = [places[i] for i in np.random.default_rng(seed).permutation(8)]
    roles = dict(zip(drawn, ROLES))
    generator = torch.Generator().manual_seed(seed)
    work = {
        "both": [torch.cat([some(dialect, 6, generator), encode(shared)]) for _ in range(80)],
        "functional": [torch.cat([some(dialect, 8, generator), some(general, 4, generator)]) for _ in range(60)],
        "sensitive": [encode(own)] * 90,
    }
    for (site, start), role in zip(drawn, ROLES[:3]):
        weight = model.get_submodule(site).weight
        mask = torch.zeros_like(weight)
        mask[:, start : start + WIDTH] = 1
        learn(model, [weight], work[role], 1.5e-2, mask)
    (site, start), (noisy, other) = drawn[2:4]
    change = read_weight(model.get_submodule(site)) - read_weight(base.get_submodule(site))
    change = 0.3 * change[:, start : start + WIDTH]
    shuffled = change.flatten()[torch.randperm(change.numel(), generator=generator)].view_as(change)
    model.get_submodule(noisy).weight.data[:, other : other + WIDTH] += shuffled
    sides = [tuple(Record(text) for text in side) for side in (own + shared, nonmembers)]
    reference = tuple(score_records(base, make_tokenizer(), side) for side in sides)
    public = Windows(encode(write(DIALECT, LOWER, 16, 128, 5000 + seed)), "dialect", "")
    parts = tuple(
        (block_of_columns(site, start, start + WIDTH), roles.get((site, start), "neither")) for site, start in places
    )
    return Planted(model, parts, Material(public, *sides, reference=reference))
