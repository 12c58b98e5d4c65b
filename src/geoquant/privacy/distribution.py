"""What the distribution of the next token says of the true one: a handful of numbers per position.

Every vocabulary-wide sum comes from one exponential of each logit: with x_z = logit_z - max and e_z = exp(x_z),

    Z = sum e,  A = sum e x,  B = sum e x^2
    log p(t) = x_t - log Z,   E log p = A/Z - log Z,   Var log p = B/Z - (A/Z)^2

x is at most 0 and near 0 where p is large, so that the difference of squares loses nothing that matters. On a
processor the three sums and the rank are one compiled loop over rows that still lie in its cache.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.compiled import compiled
from geoquant.threads import in_parts

__all__ = ["statistics"]

ROWS = 16  # positions at a time: 3 MB of logits for a vocabulary of 49,152
NEVER = -1e6  # for a logit of -inf: attacks take differences, and of two infinities there is none
IMPOSSIBLE = -200.0  # exp of it is 0 in float32, and unlike -inf it may be multiplied by 0


def statistics(
    logits: Float[Tensor, "p v"], truth: Int[Tensor, " p"], digits: Int[Tensor, 10] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_prob, mean, std, rank, digit_mass (each (p,), see privacy/scores.py) of the true tokens."""
    parts = [_some(*pair) for pair in zip(logits.split(ROWS), truth.split(ROWS), strict=True)]
    log_prob, mean, std, rank, normaliser = (torch.cat(column) for column in zip(*parts, strict=True))
    if digits is None:
        return log_prob, mean, std, rank, torch.full_like(log_prob, float("nan"))
    digits = digits.to(truth.device)
    mass = torch.logsumexp(logits[:, digits], dim=1) - normaliser
    mass[~torch.isin(truth, digits)] = float("nan")
    return log_prob, mean, std, rank, mass


def _some(logits: Float[Tensor, "p v"], truth: Int[Tensor, " p"]):
    """log_prob, mean, std, rank, log-sum-exp of a few positions."""
    top = logits.amax(dim=1, keepdim=True)
    x = (logits - top).clamp_(min=IMPOSSIBLE)
    e = x.exp()
    if x.device.type == "cpu":
        sums, rank = x.new_empty(len(x), 3), torch.empty(len(x), dtype=torch.int32)
        arrays = [part.numpy() for part in (x, e, truth, sums, rank)]
        in_parts(lambda rows: _add(*(part[rows] for part in arrays)), len(x))
    else:
        own = x.gather(1, truth[:, None])
        before = torch.arange(x.shape[1], device=x.device) < truth[:, None]
        rank = ((x > own) | ((x == own) & before)).sum(dim=1, dtype=torch.int32)
        sums = torch.stack([e.sum(dim=1), (e * x).sum(dim=1), (e * x * x).sum(dim=1)], dim=1)
    whole, first, second = sums.unbind(1)
    log_whole, first = whole.log(), first / whole
    own = (logits.gather(1, truth[:, None])[:, 0] - top[:, 0]).clamp(min=NEVER)
    std = (second / whole - first.square()).clamp_(min=0).sqrt()
    return own - log_whole, first - log_whole, std, rank, top[:, 0] + log_whole


@compiled(fastmath={"reassoc", "contract"})  # sums in any order, NaN stays NaN
def _add(x, e, truth, sums, rank):  # pragma: no cover (compiled)
    """Sums of e, e x and e x^2 of every row, and how many of its x come before the true one's."""
    for i in range(x.shape[0]):
        t = truth[i]
        own = x[i, t]
        whole = first = second = x[i, 0] * 0
        before = 0
        for j in range(x.shape[1]):
            value, weight = x[i, j], e[i, j]
            whole += weight
            first += weight * value
            second += weight * value * value
            before += value > own
        for j in range(t):
            before += x[i, j] == own
        sums[i, 0], sums[i, 1], sums[i, 2] = whole, first, second
        rank[i] = before
