"""Whether the two sides of a split may be used to judge a model at all: known before any model is read.

Two things spoil a split. If the sides differ (in date, source, template, length), attacks find the difference and call
it memory: then no verdict is given. If records of one side come back on the other in slightly other words, attacks
look weaker than they are: a warning says which.
"""

from __future__ import annotations

from dataclasses import dataclass

from geoquant.data.records import Split
from geoquant.privacy.blind import BlindResult, blind_test
from geoquant.privacy.coins import check_coins
from geoquant.privacy.duplicates import THRESHOLD, NearDuplicate, near_duplicates

__all__ = ["SplitCheck", "check_sides"]

VIEWS = {"words": "their words", "word": "a single word", "sizes": "their sizes"}
SHOWN = 5  # near-duplicates that are named


@dataclass(frozen=True)
class SplitCheck:
    """What the texts of a split say about it, without any model."""

    gate: BlindResult
    near_duplicates: tuple[NearDuplicate, ...] = ()
    copies: int = 0  # records that were left out because their side holds the same text already

    @property
    def refusal(self) -> str | None:
        """Why no verdict may be given, or None."""
        if self.gate.valid:
            return None
        low, high = self.gate.ci
        return (
            f"members and non-members can be told apart by {VIEWS[self.gate.view]} alone, without any model "
            f"(blind AUC {self.gate.auc:.2f}, about {low:.2f} to {high:.2f}; p = {self.gate.p:.2g}, refused at "
            f"{self.gate.level:g}): what the attacks reach may be that difference and not memory. "
            "Deal both files out at random from one pool"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Copies and near-duplicates, in words."""
        told = ()
        if self.copies:
            told = (
                f"{self.copies} record{'s repeat' if self.copies > 1 else ' repeats'} another of the same side and "
                f"{'are' if self.copies > 1 else 'is'} left out: a copy is no further evidence",
            )
        if not self.near_duplicates:
            return told
        count = len({pair.nonmember for pair in self.near_duplicates})
        named = ", ".join(
            f"record {pair.nonmember} like member {pair.member} ({pair.similarity:.2f})"
            for pair in self.near_duplicates[:SHOWN]
        )
        more = ", ..." if len(self.near_duplicates) > SHOWN else ""
        return (
            *told,
            f"{count} non-member{'s are' if count > 1 else ' is'} nearly the same as a member (similarity at least "
            f"{THRESHOLD}: {named}{more}): the model knows them too, and attacks look weaker than they are",
        )

    def to_dict(self) -> dict:
        """The keys of report.json that speak about the split."""
        pairs = self.near_duplicates
        return {
            "gate": self.gate.to_dict(),
            "near_duplicates": {
                "threshold": THRESHOLD,
                "pairs": len(pairs),
                "nonmembers": len({pair.nonmember for pair in pairs}),
                "first": [[pair.member, pair.nonmember, pair.similarity] for pair in pairs[:SHOWN]],
            },
        }


def check_sides(split: Split, *, seed: int = 0) -> SplitCheck:
    """Both tests of one split; seconds for a few thousand records.

    Raises UserError where its canaries were not included by fair coins.
    """
    check_coins(split)
    return SplitCheck(
        blind_test(split.members, split.nonmembers, seed=seed),
        near_duplicates(split.members, split.nonmembers),
        split.copies,
    )
