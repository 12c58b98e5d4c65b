"""What one attack finds on one model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

__all__ = ["AttackResult", "Caught", "plain"]


@dataclass(frozen=True)
class Caught:
    """Share of members found at one false positive rate.

    tpr, ci: None where the non-members are fewer than `needed`. fpr_ci: where the threshold's true rate lies.
    """

    tpr: float | None
    ci: tuple[float, float] | None
    fpr_ci: tuple[float, float]
    needed: int


@dataclass(frozen=True)
class AttackResult:
    """One attack on one model. `tpr_at_fpr` is keyed by the rate, as text.

    ci: by bootstrap; ci_delong: by DeLong's variance. p: two-sided, of "both sides score alike"; p_holm: corrected
    over the attacks on this model. Of the combination, which is fitted to the records, intervals are widened and p is
    by permutation. scores: of members and of non-members, for comparisons; not in the report.
    """

    name: str
    subject: str
    auc: float
    ci: tuple[float, float]
    ci_delong: tuple[float, float]
    p: float
    p_holm: float
    tpr_at_fpr: dict[str, Caught]
    roc: tuple[list[float], list[float]]
    scores: tuple[np.ndarray, np.ndarray] = field(repr=False, compare=False)

    def to_dict(self, verdict: bool = True) -> dict:
        """The entry of report.json; without p-values where no verdict may be given."""
        return {
            "name": self.name,
            "subject": self.subject,
            "auc": self.auc,
            "ci": list(self.ci),
            "ci_delong": list(self.ci_delong),
            "p": self.p if verdict else None,
            "p_holm": self.p_holm if verdict else None,
            "tpr_at_fpr": {rate: plain(asdict(caught)) for rate, caught in self.tpr_at_fpr.items()},
            "roc": {"fpr": self.roc[0], "tpr": self.roc[1]},
        }


def plain(values: dict) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
