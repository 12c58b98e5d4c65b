"""Two wishes for one matrix, made one: near the fine-tune where function is, near the public base where memory is.

A row q is to compute what the fine-tuned row w does on the inputs of some text, and what the base's row b does on those
of private records. With F and P the second moments of these inputs, and `||d||^2_M = d M d^T`,

    ||q - w||^2_F + mu ||q - b||^2_P  =  ||q - t||^2_A + c        for every q,

    A = F + mu P        t = (w F + mu b P) A^-1 = w + mu (b - w) P A^-1        c = ||t - w||^2_F + mu ||t - b||^2_P

(completing the square). So the closest-vector problem stays one, with another target and another metric, whatever
lattice or box q is taken from. Where F and P are alike up to a factor, t lies on the straight way from w to b.

The target alone is how RegMean merges two models: Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless knowledge fusion by
merging weights of language models", ICLR 2023, arXiv:2212.09849.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from geoquant.lattice.basis import cholesky

__all__ = ["Combined", "combined", "parts"]


class Combined(NamedTuple):
    """`t`, `A` and, of every row, `c`."""

    target: Float[Tensor, "out in"]
    metric: Float[Tensor, "in in"]
    constant: Float[Tensor, " out"]


def combined(
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"],
    function: Float[Tensor, "in in"],
    private: Float[Tensor, "in in"],
    mu: float = 1.0,
) -> Combined:
    """The one problem, in the types of `weight` and `function`; solved in double precision, for metrics of inputs reach
    condition numbers of 1e6. At mu = 0 the very tensors that were given, and zeros.

    function, private: F and P, symmetric, of any common unit; either may be singular. Raises NotPositiveDefinite where
    both are in the same directions, so that any target would do (`lattice.basis.damped` mends that), and ValueError
    for shapes that differ and a negative or infinite mu.
    """
    columns = weight.shape[-1]
    if weight.shape != base.shape or {tuple(function.shape), tuple(private.shape)} != {(columns, columns)}:
        shapes = ", ".join(str(tuple(one.shape)) for one in (weight, base, function, private))
        raise ValueError(f"a weight, a base and two metrics of shapes {shapes}")
    if not 0 <= mu < float("inf"):
        raise ValueError(f"mu {mu:g}, wanted at least 0 and finite")
    if mu == 0:
        return Combined(weight, function, weight.new_zeros(len(weight)))
    back = base.double() - weight.double()
    metric = function.double() + mu * private.double()
    pull = mu * (back @ private.double())
    lower = cholesky(metric.clone(), 0.0)
    # On whichever side there is less to solve for.
    if len(weight) <= columns:
        shift = torch.cholesky_solve(pull.T, lower).T
    else:
        shift = pull @ torch.cholesky_inverse(lower)
    # With `shift A = pull` both parts of the constant come to this.
    constant = ((back - shift) * pull).sum(1).clamp_min(0)
    target = (weight.double() + shift).to(weight.dtype).contiguous()
    return Combined(target, metric.to(function.dtype), constant.to(weight.dtype))


def parts(first: Float[Tensor, "n n"], second: Float[Tensor, "n n"], share: float) -> tuple[float, float] | None:
    """Factors that give the second of two metrics its share of a sum that keeps the trace of the first:
    `1 - share` and `share tr(first) / tr(second)`. So mu is `share / (1 - share)` in units in which both have the same
    trace, and a share of one is the second alone. None where a metric has no positive finite trace.
    """
    traces = [one.diagonal().sum(dtype=torch.float64).item() for one in (first, second)]
    if not all(0 < trace < float("inf") for trace in traces):
        return None
    return 1 - share, share * traces[0] / traces[1]
