"""Which of a few values is best, each try being noisy: bandits over a discrete list, such as quantile thresholds.

    UCB1      the arm with the largest mean + scale sqrt(2 ln t / n). Its expected regret after T tries of rewards in an
              interval of length `scale` is at most sum_i (8 scale^2 ln T / gap_i) + (1 + pi^2/3) sum_i gap_i.
    Thompson  the arm with the largest draw from a normal posterior: mean of its tries shrunk towards the prior's,
              variance scale^2 / (n + 1).

Rewards are minimised losses with the sign turned. Pure: the state is what was tried.

Auer, Cesa-Bianchi, Fischer: Finite-time analysis of the multiarmed bandit problem, Machine Learning 47, 2002,
theorem 1.
Agrawal, Goyal: Further optimal regret bounds for Thompson sampling, AISTATS 2013.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["POLICIES", "regret_bound", "thompson", "ucb"]

Tries = Sequence[Sequence[float]]  # by arm, its rewards so far


def ucb(tries: Tries, rng: np.random.Generator, scale: float = 1.0) -> int:
    """The next arm by UCB1; each arm once first, in order. `rng` is not used."""
    for arm, rewards in enumerate(tries):
        if not rewards:
            return arm
    total = sum(map(len, tries))
    return int(np.argmax([sum(one) / len(one) + scale * math.sqrt(2 * math.log(total) / len(one)) for one in tries]))


def thompson(tries: Tries, rng: np.random.Generator, scale: float = 1.0) -> int:
    """The next arm by Thompson sampling; the prior's mean is that of all tries."""
    known = [reward for rewards in tries for reward in rewards]
    prior = float(np.mean(known)) if known else 0.0
    means = np.array([(sum(rewards) + prior) / (len(rewards) + 1) for rewards in tries])
    spread = scale / np.sqrt([len(rewards) + 1 for rewards in tries])
    return int(np.argmax(rng.normal(means, spread)))


def regret_bound(gaps: Sequence[float], tries: int, scale: float = 1.0) -> float:
    """Theorem 1 of Auer et al. for rewards in an interval of length `scale`; gaps: best mean minus each arm's."""
    worse = [gap for gap in gaps if gap > 0]
    return sum(8 * scale**2 * math.log(tries) / gap for gap in worse) + (1 + math.pi**2 / 3) * sum(worse)


POLICIES = {"ucb": ucb, "thompson": thompson}
