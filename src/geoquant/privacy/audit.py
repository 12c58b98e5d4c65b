"""The audit: scores of one or several models in, what they reveal out, every rate with its interval.

Measured, against the records that were given:
- **attacks** decide for each record whether it was trained on. AUC 0.5 is guessing; TPR at 1% FPR is the
  share of members found while accusing one non-member in a hundred. Non-members must come from the members'
  distribution: otherwise the attack measures the difference of the two files, not memory.
- **extraction**: marked private spans written out verbatim by greedy decoding from their true prefix.
- **exposure**: bits by which planted secrets stand out.

Not measured: stronger attacks (shadow models, sampling, prompts an attacker invents), other records than
these, paraphrases. The audit never issues a guarantee (`guarantee` is None): low numbers mean that these
attacks, on these records, found little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from geoquant.data.records import Split
from geoquant.errors import UserError
from geoquant.privacy.attacks import ATTACKS
from geoquant.privacy.exposure import Exposure, exposure
from geoquant.privacy.extraction import Extraction, extraction
from geoquant.privacy.scores import SplitScores
from geoquant.privacy.statistics import auc, auc_interval, roc_points, tpr_at_fpr

__all__ = ["AttackResult", "Audit", "audit", "merge"]

FALSE_POSITIVE_RATES = (0.01,)


@dataclass(frozen=True)
class AttackResult:
    """One attack on one model. `tpr_at_fpr` maps the rate, as text, to the TPR and its interval."""

    name: str
    subject: str
    auc: float
    ci: tuple[float, float]
    tpr_at_fpr: dict[str, tuple[float, tuple[float, float]]]
    roc: tuple[list[float], list[float]]

    def to_dict(self) -> dict:
        """The entry of report.json."""
        rates = {fpr: {"tpr": tpr, "ci": list(ci)} for fpr, (tpr, ci) in self.tpr_at_fpr.items()}
        return {
            "name": self.name,
            "subject": self.subject,
            "auc": self.auc,
            "ci": list(self.ci),
            "tpr_at_fpr": rates,
            "roc": {"fpr": self.roc[0], "tpr": self.roc[1]},
        }


@dataclass(frozen=True)
class Audit:
    """What one or several subjects (base, original, quantized) reveal; extraction and exposure by subject."""

    attacks: tuple[AttackResult, ...]
    extraction: tuple[tuple[str, Extraction], ...]
    exposure: tuple[tuple[str, Exposure], ...]
    n_members: int
    n_nonmembers: int
    warnings: tuple[str, ...] = ()
    guarantee: None = None

    def attack(self, name: str, subject: str) -> AttackResult | None:
        """The result of one attack on one subject."""
        return next((a for a in self.attacks if (a.name, a.subject) == (name, subject)), None)

    def extracted(self, subject: str, kind: str = "all") -> Extraction | None:
        """The extraction of one kind of span from one subject."""
        return next((e for s, e in self.extraction if (s, e.kind) == (subject, kind)), None)

    def to_dict(self) -> dict:
        """The `privacy` part of report.json: numbers, texts and lists only."""
        return {
            "attacks": [attack.to_dict() for attack in self.attacks],
            "extraction": [{"subject": subject, **_plain(asdict(part))} for subject, part in self.extraction],
            "exposure": [
                {
                    "subject": subject,
                    "canaries": [_plain(asdict(canary)) for canary in part.canaries],
                    "mean_bits": part.mean_bits,
                    "limit_bits": part.limit_bits,
                    "estimator": part.estimator,
                }
                for subject, part in self.exposure
            ],
            "guarantee": self.guarantee,
            "n_members": self.n_members,
            "n_nonmembers": self.n_nonmembers,
            "warnings": list(self.warnings),
        }


def _plain(values: dict) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def audit(subject: str, target: SplitScores, reference: SplitScores | None, split: Split, *, seed: int = 0) -> Audit:
    """Run every attack that the given scores allow on one subject.

    target, reference: scores of the same split under the audited model and under its public base (None:
    attacks that need one are left out, and the audit says so; pass None for the base itself, which has no
    base).

    Raises UserError when the scores do not belong to the split or the two models tokenise differently.
    """
    sizes = (len(target.members), len(target.nonmembers))
    if sizes != (len(split.members), len(split.nonmembers)):
        raise UserError(
            "scores and records do not belong together",
            got=f"scores of {sizes[0]} + {sizes[1]} records",
            wanted=f"{len(split.members)} + {len(split.nonmembers)}",
        )
    attacks = []
    for name, attack in ATTACKS.items():
        if attack.needs_reference and reference is None:
            continue
        members = attack.score(target.members, reference and reference.members)
        nonmembers = attack.score(target.nonmembers, reference and reference.nonmembers)
        attacks.append(
            AttackResult(
                name,
                subject,
                auc(members, nonmembers),
                auc_interval(members, nonmembers, seed=seed),
                {f"{rate:g}": tpr_at_fpr(members, nonmembers, rate) for rate in FALSE_POSITIVE_RATES},
                roc_points(members, nonmembers),
            )
        )
    spans = extraction(target.members, target.nonmembers, split.members, split.nonmembers)
    secrets = exposure(target.canaries, split.canaries, target.decoys) if target.canaries else None
    return Audit(
        tuple(attacks),
        tuple((subject, part) for part in spans),
        ((subject, secrets),) if secrets else (),
        *sizes,
        warnings=_warnings(split, spans, secrets),
    )


def _warnings(split: Split, spans: tuple[Extraction, ...], secrets: Exposure | None) -> tuple[str, ...]:
    """What these records cannot resolve, in words for the report."""
    count = len(split.nonmembers)
    found = [
        f"TPR at {rate:.0%} FPR is read at zero false positives: {count} non-members cannot resolve "
        f"{rate:.0%} (at least {round(1 / rate)} are needed)"
        for rate in FALSE_POSITIVE_RATES
        if count * rate < 1
    ]
    if not spans:
        found.append("no marked private spans: extraction was not measured")
    if not split.canaries:
        found.append("no canaries: exposure was not measured")
    elif secrets is None:
        found.append("no canary could be scored: exposure was not measured")
    elif len(secrets.canaries) < len(split.canaries):
        found.append(f"{len(split.canaries) - len(secrets.canaries)} canaries could not be scored and are left out")
    return tuple(found)


def merge(audits: Iterable[Audit]) -> Audit:
    """One audit of several subjects from audits of the same split."""
    audits = list(audits)
    if len({(a.n_members, a.n_nonmembers) for a in audits}) != 1:
        raise UserError("audits of different records cannot be put together")
    return Audit(
        tuple(part for a in audits for part in a.attacks),
        tuple(part for a in audits for part in a.extraction),
        tuple(part for a in audits for part in a.exposure),
        audits[0].n_members,
        audits[0].n_nonmembers,
        warnings=tuple(dict.fromkeys(text for a in audits for text in a.warnings)),
    )
