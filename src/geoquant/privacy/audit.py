"""The audit: scores of one or several models in, what they reveal out, every rate with its interval.

Measured, against the records that were given:
- **attacks** decide for each record whether it was trained on. AUC 0.5 is guessing; TPR at 1% FPR is the
  share of members found while accusing one non-member in a hundred. Non-members must come from the members'
  distribution: otherwise the attack measures the difference of the two files, not memory. Where a baseline that
  sees no model tells the files apart (privacy/blind.py), p-values and verdict are withheld.
- **comparisons**: how each attack's AUC changes from model to model, paired by record.
- **extraction**: marked private spans written out verbatim from their true prefix, by greedy decoding and in so many
  samples; the same values asked for by name (privacy/prompts.py); records continued from their first tokens
  (privacy/suffixes.py).
- **exposure**: bits by which planted secrets stand out.
- **one-run audit**: where coins decided which canaries were planted, a lower bound on the epsilon of whatever made the
  model of them (privacy/one_run.py).

Where shadow models were trained (privacy/shadows.py), attacks compare with them. A combination of all attacks is the
strongest attacker tried. Not measured: prompts other than ours, other records than these, paraphrases.
The audit never issues a guarantee (`guarantee` is None): low numbers mean that these attacks, on these records,
found little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from geoquant.data.records import Split
from geoquant.errors import UserError
from geoquant.privacy.attacks import membership_scores
from geoquant.privacy.attacks.combined import combine, widened
from geoquant.privacy.coins import audit_coins, most
from geoquant.privacy.comparison import Comparison, compare_subjects
from geoquant.privacy.delong import delong_interval
from geoquant.privacy.evidence import gather
from geoquant.privacy.exposure import Exposure, exposure
from geoquant.privacy.extraction import Extraction, extraction
from geoquant.privacy.one_run import OneRunBound
from geoquant.privacy.outcome import AttackResult, Caught, plain
from geoquant.privacy.prompts import make_prompts, prompted_extraction
from geoquant.privacy.scores import SplitScores
from geoquant.privacy.shadows import Shadows
from geoquant.privacy.statistics import auc, auc_interval, chance_p, holm, needed, realised_fpr, roc_points, tpr_at_fpr
from geoquant.privacy.suffixes import SuffixExtraction, suffix_extraction
from geoquant.privacy.validity import SplitCheck

__all__ = ["COMBINED", "Audit", "audit", "merge"]

FALSE_POSITIVE_RATES = (0.1, 0.01, 0.001)
LEVEL = 0.05  # of the verdict, after Holm's correction over the attacks on one model
COMBINED = "combined"
COARSE = 5  # times the non-members a rate needs; below, how far the threshold may be off is said


@dataclass(frozen=True)
class Audit:
    """What one or several subjects (base, original, quantized) reveal; all but the attacks by subject.

    check: whether the records may be used for that; None where nobody looked.
    """

    attacks: tuple[AttackResult, ...]
    extraction: tuple[tuple[str, Extraction], ...]
    exposure: tuple[tuple[str, Exposure], ...]
    n_members: int
    n_nonmembers: int
    warnings: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    check: SplitCheck | None = None
    one_run: tuple[tuple[str, OneRunBound], ...] = ()
    prompted: tuple[tuple[str, Extraction], ...] = ()
    suffixes: tuple[tuple[str, SuffixExtraction], ...] = ()
    shadows: Shadows | None = None
    guarantee: None = None

    @property
    def refusal(self) -> str | None:
        """Why these records allow no verdict, or None."""
        return self.check and self.check.refusal

    def verdict(self) -> list[dict] | None:
        """For each subject the strongest attack and whether it separates members at LEVEL; None where refused.

        That no attack separates them says nothing about attacks that were not run.
        """
        if self.refusal:
            return None
        found = []
        for subject in dict.fromkeys(attack.subject for attack in self.attacks):
            tried = [attack for attack in self.attacks if attack.subject == subject]
            best = max(tried, key=lambda attack: (attack.p_holm <= LEVEL, abs(attack.auc - 0.5)))
            separates = best.p_holm <= LEVEL
            found.append({"subject": subject, "attack": best.name, "separates": separates, "level": LEVEL})
        return found

    def attack(self, name: str, subject: str) -> AttackResult | None:
        """The result of one attack on one subject."""
        return next((a for a in self.attacks if (a.name, a.subject) == (name, subject)), None)

    def extracted(self, subject: str, kind: str = "all") -> Extraction | None:
        """The extraction of one kind of span from one subject."""
        return next((e for s, e in self.extraction if (s, e.kind) == (subject, kind)), None)

    def to_dict(self) -> dict:
        """The `privacy` part of report.json: numbers, texts and lists only."""
        allowed = self.refusal is None
        return {
            "attacks": [attack.to_dict(allowed) for attack in self.attacks],
            "comparisons": [part.to_dict(allowed) for part in self.comparisons],
            "verdict": self.verdict(),
            "no_verdict": self.refusal,
            **(self.check.to_dict() if self.check else {"gate": None, "near_duplicates": None}),
            "extraction": [{"subject": subject, **plain(asdict(part))} for subject, part in self.extraction],
            "prompted": [{"subject": subject, **plain(asdict(part))} for subject, part in self.prompted],
            "suffixes": [
                {"subject": subject, "prefix": part.prefix, "tokens": part.tokens, **plain(asdict(part.found))}
                for subject, part in self.suffixes
            ],
            "exposure": [
                {
                    "subject": subject,
                    "canaries": [plain(asdict(canary)) for canary in part.canaries],
                    "mean_bits": part.mean_bits,
                    "limit_bits": part.limit_bits,
                    "estimator": part.estimator,
                }
                for subject, part in self.exposure
            ],
            "one_run": [{"subject": subject, **asdict(bound), "most": most(bound)} for subject, bound in self.one_run],
            "shadows": self.shadows and self.shadows.to_dict(),
            "guarantee": self.guarantee,
            "n_members": self.n_members,
            "n_nonmembers": self.n_nonmembers,
            "warnings": list(self.warnings),
        }


def audit(
    subject: str,
    target: SplitScores,
    reference: SplitScores | None,
    split: Split,
    *,
    shadows: Shadows | None = None,
    seed: int = 0,
) -> Audit:
    """Run every attack that the given scores allow on one subject.

    target, reference: scores of the same split under the audited model and under its public base (None:
    attacks that need one are left out, and the audit says so; pass None for the base itself, which has no
    base). shadows: models that were trained as this one was, on halves of the split.

    Raises UserError when the scores do not belong to the split or the two models tokenise differently.
    """
    sizes = (len(target.members), len(target.nonmembers))
    if sizes != (len(split.members), len(split.nonmembers)):
        raise UserError(
            "scores and records do not belong together",
            got=f"scores of {sizes[0]} + {sizes[1]} records",
            wanted=f"{len(split.members)} + {len(split.nonmembers)}",
        )
    inside = gather(
        split.members,
        target.members,
        reference and reference.members,
        target.lowered_members,
        shadows and shadows.members,
    )
    outside = gather(
        split.nonmembers,
        target.nonmembers,
        reference and reference.nonmembers,
        target.lowered_nonmembers,
        shadows and shadows.nonmembers,
    )
    scores = membership_scores(inside, outside)
    p = {name: chance_p(*sides) for name, sides in scores.items()}
    fitted = combine(scores, seed=seed)
    if fitted is not None:
        scores, p = scores | {COMBINED: fitted.scores}, p | {COMBINED: fitted.p}
    corrected = dict(zip(p, holm(list(p.values())), strict=True))
    attacks = tuple(
        AttackResult(
            name,
            subject,
            area := auc(*sides),
            _wide_enough(name, auc_interval(*sides, seed=seed), area),
            _wide_enough(name, delong_interval(*sides), area),
            p[name],
            corrected[name],
            {f"{rate:g}": _caught(*sides, rate) for rate in FALSE_POSITIVE_RATES},
            roc_points(*sides),
            sides,
        )
        for name, sides in scores.items()
    )
    spans = extraction(target.members, target.nonmembers, split.members, split.nonmembers)
    prompts = (make_prompts(side) for side in (split.members, split.nonmembers))
    asked = prompted_extraction(target.prompted_members, target.prompted_nonmembers, *prompts)
    secrets = exposure(target.canaries, split.canaries, target.decoys, target.walked) if target.canaries else None
    coins = audit_coins(target, reference, split, seed=seed)
    return Audit(
        attacks,
        tuple((subject, part) for part in spans),
        ((subject, secrets),) if secrets else (),
        *sizes,
        warnings=_warnings(split, spans, secrets),
        one_run=((subject, coins),) if coins else (),
        prompted=tuple((subject, part) for part in asked),
        suffixes=tuple((subject, part) for part in suffix_extraction(target.members, target.nonmembers)),
    )


def _wide_enough(name: str, interval: tuple[float, float], area: float) -> tuple[float, float]:
    """Intervals are made for scores that were not fitted to the records."""
    return widened(interval, area) if name == COMBINED else interval


def _caught(members: np.ndarray, nonmembers: np.ndarray, rate: float) -> Caught:
    count, least = len(nonmembers), needed(rate)
    tpr, ci = tpr_at_fpr(members, nonmembers, rate) if count >= least else (None, None)
    return Caught(tpr, ci, realised_fpr(rate, count), least)


def _warnings(split: Split, spans: tuple[Extraction, ...], secrets: Exposure | None) -> tuple[str, ...]:
    """What these records cannot resolve, in words for the report."""
    count, found = len(split.nonmembers), []
    if beyond := [rate for rate in FALSE_POSITIVE_RATES if count < needed(rate)]:
        rates, least = (" and ".join(texts) for texts in zip(*((f"{100 * r:g}%", str(needed(r))) for r in beyond)))
        found.append(
            f"{count} non-members cannot resolve {rates} FPR (at least {least} are needed): no TPR is given there"
        )
    for rate in FALSE_POSITIVE_RATES:
        if needed(rate) <= count < COARSE * needed(rate):
            low, high = realised_fpr(rate, count)
            found.append(
                f"the threshold of {100 * rate:g}% FPR is set by {count * rate:.0f} of {count} non-members: its true "
                f"rate is anywhere from {100 * low:.2g}% to {100 * high:.2g}%"
            )
    if not spans:
        found.append("no marked private spans: extraction was not measured")
    if not split.canaries:
        found.append("no canaries: exposure was not measured")
    elif secrets is None:
        found.append("no canary could be scored: exposure was not measured")
    elif len(secrets.canaries) < len(split.canaries):
        found.append(f"{len(split.canaries) - len(secrets.canaries)} canaries could not be scored and are left out")
    return tuple(found)


def merge(audits: Iterable[Audit], check: SplitCheck | None = None, shadows: Shadows | None = None) -> Audit:
    """One audit of several subjects from audits of the same split, each compared with the one before it."""
    audits = list(audits)
    if len({(a.n_members, a.n_nonmembers) for a in audits}) != 1:
        raise UserError("audits of different records cannot be put together")
    return Audit(
        tuple(part for a in audits for part in a.attacks),
        tuple(part for a in audits for part in a.extraction),
        tuple(part for a in audits for part in a.exposure),
        audits[0].n_members,
        audits[0].n_nonmembers,
        warnings=tuple(dict.fromkeys(text for a in audits for text in a.warnings))
        + (check.warnings if check else ())
        + (shadows.warnings if shadows else ()),
        # DeLong's test is for scores that were not fitted to the records.
        comparisons=compare_subjects([[one for one in a.attacks if one.name != COMBINED] for a in audits]),
        check=check,
        one_run=tuple(part for a in audits for part in a.one_run),
        prompted=tuple(part for a in audits for part in a.prompted),
        suffixes=tuple(part for a in audits for part in a.suffixes),
        shadows=shadows,
    )
