"""What one text does at one site: sums over its tokens, of inputs x and of loss gradients g at the outputs.

Sums and not means: those of two sets of tokens add. That is how every score gets its standard error (uncertainty.py):
the sums of each part of a text are kept, and the score is taken again without each part in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.outliers.derived import remembered

__all__ = ["BINS", "REACH", "SMALL", "Statistics", "edges", "left_out", "metrics", "nothing_of", "summarise", "total"]

SMALL = 0.01  # of the unit: an input below is taken for silent
BINS = 65
REACH = 7.0  # asinh of the largest value with a bin of its own: about 548 units
INPUTS = ("hessian", "fourth", "largest", "silent", "histogram")  # know nothing of the outputs


@dataclass(frozen=True)
class Statistics:
    """Sums over the tokens of a text, or of a part of it, at one site. g is in nats per unit of the output, of the
    loss summed over tokens. Sites that read the same inputs share the tensors of `INPUTS`.

    tokens:    how many. unit: root mean square of the site's inputs where it was first seen; of all texts the same.
    hessian:   (in, in) `sum_t x x^T`, the plain metric A.
    weighted:  (in, in) `sum_t ||g||^2 x x^T`, the token-weighted metric A_g (it holds tr G already).
    output:    (out,) `sum_t g^2`, the diagonal of G.
    fisher:    (out, in) `sum_t g_i^2 x_j^2`, the diagonal empirical Fisher of the weights, per token.
    gradient:  (out, in) `sum_t g_i x_j`, the gradient of the summed loss.
    fourth:    (in,) `sum_t x^4`.
    largest:   (in,) `max_t |x|`.
    silent:    (in,) tokens with |x| below `SMALL` units.
    histogram: (in, BINS) tokens by asinh(x / unit), a fixed grid; the ends take what lies beyond.
    """

    tokens: float
    unit: float
    hessian: Float[Tensor, "in in"]
    weighted: Float[Tensor, "in in"]
    output: Float[Tensor, " out"]
    fisher: Float[Tensor, "out in"]
    gradient: Float[Tensor, "out in"]
    fourth: Float[Tensor, " in"]
    largest: Float[Tensor, " in"]
    silent: Float[Tensor, " in"]
    histogram: Float[Tensor, "in bins"]

    def __add__(self, other: Statistics) -> Statistics:
        joined = {}
        for name in (field.name for field in fields(self)):
            one, two = getattr(self, name), getattr(other, name)
            joined[name] = remembered(_JOIN.get(name, torch.add), one, two) if name in INPUTS else one + two
        return Statistics(**joined | {"unit": self.unit})

    def mean(self, name: str) -> Tensor:
        """One of the sums divided by the tokens; without tokens the sum, which is zero."""
        return getattr(self, name) / max(self.tokens, 1.0)


_JOIN = {"largest": torch.maximum}


def edges(unit: float) -> Float[Tensor, " bins+1"]:
    """Where the bins of `histogram` begin and end, in float64. The outer two take what lies beyond."""
    places = torch.arange(BINS + 1, dtype=torch.float64) / BINS * 2 - 1
    return (places * REACH).sinh() * unit


def summarise(
    x: Float[Tensor, "tokens in"], g: Float[Tensor, "tokens out"], unit: float, like: Statistics | None = None
) -> Statistics:
    """The statistics of some tokens.

    like: those of another site that read these very inputs, in the same unit; what it knows of them is shared. Raises
    ValueError for a unit that is not positive: the histogram would count nothing.
    """
    if not unit > 0:
        raise ValueError(f"unit > 0 must hold, but got unit={unit}")
    squares, energies = x.square(), g.square()
    roots = x * energies.sum(1, keepdim=True).sqrt()
    known = _of_inputs(x, squares, unit) if like is None else {name: getattr(like, name) for name in INPUTS}
    return Statistics(
        tokens=float(len(x)),
        unit=unit,
        weighted=roots.T @ roots,
        output=energies.sum(0),
        fisher=energies.T @ squares,
        gradient=g.T @ x,
        **known,
    )


def _of_inputs(x: Float[Tensor, "tokens in"], squares: Float[Tensor, "tokens in"], unit: float) -> dict[str, Tensor]:
    places = ((torch.asinh(x / unit) / REACH + 1) * (BINS / 2)).floor().clamp(0, BINS - 1).long()
    columns = torch.arange(x.shape[1], device=x.device) * BINS
    counts = torch.bincount((places + columns).flatten(), minlength=x.shape[1] * BINS)
    return {
        "hessian": x.T @ x,
        "fourth": squares.square().sum(0),
        "largest": x.abs().amax(0),
        "silent": (x.abs() < SMALL * unit).float().sum(0),
        "histogram": counts.view(-1, BINS).float(),
    }


def nothing_of(other: Statistics) -> Statistics:
    """The statistics of no tokens, at the site of `other`."""
    return Statistics(0.0, other.unit, *(torch.zeros_like(getattr(other, field.name)) for field in fields(other)[2:]))


def total(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of all parts together."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def metrics(parts: Sequence[Statistics], most: int = 128) -> Float[Tensor, "parts n n"]:
    """`mean x x^T` of each part alone, of at most `most` inputs, evenly spaced."""
    columns = len(parts[0].hessian)
    chosen = torch.linspace(0, columns - 1, min(most, columns)).round().long().to(parts[0].hessian.device)
    return torch.stack([part.mean("hessian")[chosen[:, None], chosen] for part in parts])


def left_out(parts: Sequence[Statistics]) -> Iterator[Statistics]:
    """The statistics of all parts but one, leaving out each in turn; of a single part, those of no tokens.

    Summed anew: the whole less a part that holds a massive token would leave nothing but rounding.
    """
    for index in range(len(parts)):
        others = [*parts[:index], *parts[index + 1 :]]
        yield total(others) if others else nothing_of(parts[0])
