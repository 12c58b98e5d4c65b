"""What is commonly said of compression and privacy, and whether rows of benchmarks/privacy_curve.py bear it out.

A statement is confirmed when every case it can be tried on confirms it, and a case when its interval or test says so
at the 5% level, corrected (Holm) over the cases of the statement. Everything else is "not confirmed", which does not
mean refuted: the numbers of each case stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, spearmanr

from geoquant.privacy.delong import paired_difference
from geoquant.privacy.statistics import clopper_pearson, holm

PRIMARY = "reference"  # the attack that the statements are tried with, fixed before any number was seen
KEPT = 0.01  # nats per token by which a loss may grow and utility still counts as kept: 1% of perplexity
LEVEL = 0.05
BEFORE, AFTER = (0.0, 0.05), (0.60, 0.75)  # shares of secrets that are said to leak
IDENTIFYING = {"id", "phone", "card", "account"}  # random digits: nobody guesses them from the context
Z = float(norm.ppf(0.975))

Rows = dict[tuple[str, str], dict]  # by regime and point


@dataclass(frozen=True)
class Case:
    """One place where a statement was tried, what was found there, and whether that confirms it."""

    where: str
    found: str
    confirmed: bool


@dataclass(frozen=True)
class Verdict:
    """A statement and its cases."""

    claim: str
    cases: tuple[Case, ...]

    @property
    def confirmed(self) -> bool:
        """Whether there is a case and none that fails to confirm it."""
        return bool(self.cases) and all(case.confirmed for case in self.cases)

    @property
    def mark(self) -> str:
        """In words, with how many cases confirm it."""
        held = sum(case.confirmed for case in self.cases)
        return f"{'confirmed' if self.confirmed else 'not confirmed'} ({held} of {len(self.cases)})"


def claims(rows: Sequence[dict]) -> list[Verdict]:
    """All statements against all rows."""
    table = {(row["regime"], row["point"]): row for row in rows}
    return [
        Verdict("8 bits keep utility", utility_kept(table, "8")),
        Verdict("8 bits lower the AUC", auc_lowered(table, "original", "8")),
        Verdict("4 bits lower the AUC more than 8", auc_lowered(table, "8", "4")),
        Verdict("before fine-tuning 0-5% of the identifiers leak", leaks(table, "base", BEFORE)),
        Verdict("after fine-tuning 60-75% leak", leaks(table, "original", AFTER)),
        Verdict("the better the model, the better the attack", together(table, "AUC", auc_of)),
        Verdict("the better the model, the higher the exposure", together(table, "exposure", exposure_of)),
    ]


def regimes_in(rows: Rows) -> list[str]:
    """In the order of the rows."""
    return list(dict.fromkeys(regime for regime, _ in rows))


def solvers_at(rows: Rows, regime: str, bits: str) -> list[str]:
    """Who made points of so many bits."""
    points = (point for where, point in rows if where == regime)
    return [solver for solver, _, rest in (point.partition("-") for point in points) if rest == bits]


def utility_kept(rows: Rows, bits: str) -> tuple[Case, ...]:
    """Both losses, on public text and on held-out records of the domain: upper ends of the 95% intervals below KEPT."""
    cases = []
    for regime in regimes_in(rows):
        for solver in solvers_at(rows, regime, bits):
            row = rows[regime, f"{solver}-{bits}"]
            ends = {
                name: row[key]["value"] + Z * row[key]["se"]
                for name, key in (("public", "delta_nll"), ("domain", "domain_delta"))
            }
            found = ", ".join(f"{name} loss at most {end:+.4f}" for name, end in ends.items())
            cases.append(Case(f"{regime}, {solver}", found, max(ends.values()) < KEPT))
    return tuple(cases)


def auc_lowered(rows: Rows, before: str, after: str) -> tuple[Case, ...]:
    """DeLong's paired test on the same records, from `before` (a point, or the same solver's bits) to `after` bits."""
    pairs = []
    for regime in regimes_in(rows):
        for solver in solvers_at(rows, regime, after):
            first = rows.get((regime, before)) or rows.get((regime, f"{solver}-{before}"))
            if first is not None:
                second = rows[regime, f"{solver}-{after}"]
                pairs.append((f"{regime}, {solver}", paired_difference(scores_of(first), scores_of(second))))
    corrected = holm([difference.p for _, difference in pairs])
    return tuple(
        Case(
            where,
            f"AUC {d.value:+.3f} ({d.ci[0]:+.3f} to {d.ci[1]:+.3f}), p {p:.2g}",
            bool(d.value < 0 and p < LEVEL),
        )
        for (where, d), p in zip(pairs, corrected, strict=True)
    )


def leaks(rows: Rows, point: str, window: tuple[float, float]) -> tuple[Case, ...]:
    """Identifiers written out verbatim by greedy decoding: the whole interval of their share lies in the window."""
    cases = []
    for regime in regimes_in(rows):
        row = rows.get((regime, point))
        spans, extracted = identifiers(row) if row else (0, 0)
        if spans:
            low, high = clopper_pearson(extracted, spans)
            found = f"{extracted} of {spans}: {100 * low:.1f} to {100 * high:.1f}%"
            cases.append(Case(regime, found, window[0] <= low and high <= window[1]))
    return tuple(cases)


def identifiers(row: dict) -> tuple[int, int]:
    """Spans of identifying kinds, and those that were extracted."""
    parts = [part for kind, part in row["extraction"].items() if kind in IDENTIFYING]
    return sum(part["spans"] for part in parts), sum(part["extracted"] for part in parts)


def together(rows: Rows, name: str, success: Callable[[dict], float | None]) -> tuple[Case, ...]:
    """Rank correlation of utility (less loss on public text) and the attack's success over the points of a regime.

    Confirmed where the 95% interval lies above zero. Where the attack succeeds alike at all points there is no
    correlation to speak of.
    """
    cases = []
    for regime in regimes_in(rows):
        points = [row for (where, point), row in rows.items() if where == regime and point != "base"]
        pairs = [(-row["nll"], value) for row in points if (value := success(row)) is not None]
        if len(pairs) < 5:
            continue
        utility, attack = (np.array(side) for side in zip(*pairs))
        if np.ptp(attack) == 0 or np.ptp(utility) == 0:
            cases.append(Case(regime, f"{name} {attack[0]:.3g} at all {len(pairs)} points", False))
            continue
        value = float(spearmanr(utility, attack).statistic)
        low, high = rank_interval(value, len(pairs))
        cases.append(
            Case(regime, f"rank correlation {value:.2f} ({low:.2f} to {high:.2f}), {len(pairs)} points", low > 0)
        )
    return tuple(cases)


def rank_interval(value: float, n: int) -> tuple[float, float]:
    """95% interval of Spearman's correlation of n pairs, on Fisher's scale with the variance (1 + r^2 / 2) / (n - 3).

    Bonett and Wright: Sample size requirements for estimating Pearson, Kendall and Spearman correlations,
    Psychometrika 2000. A perfect order, whose interval would have no width, is taken for the next lower value that n
    pairs without ties can have.
    """
    most = 1 - 12 / (n * (n * n - 1))
    value = max(-most, min(most, value))
    half = Z * math.sqrt((1 + value**2 / 2) / (n - 3))
    return math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half)


def scores_of(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the primary attack on members and on non-members."""
    return tuple(np.array(side) for side in row["scores"][PRIMARY])


def auc_of(row: dict) -> float | None:
    """Of the primary attack."""
    return row["attacks"][PRIMARY]["auc"] if PRIMARY in row["attacks"] else None


def exposure_of(row: dict) -> float | None:
    """Mean bits of the planted canaries."""
    return row["exposure"]["mean"] if row["exposure"] else None
