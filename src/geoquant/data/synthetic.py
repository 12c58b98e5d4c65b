"""Private records of people who do not exist, split by coin flips, to train a model on and audit it with.

One generator makes all records of a domain; then a coin decides for each, independently, whether it is a member, a
non-member or held out, so the sides differ in nothing but the coin. No name, number, address or key occurs twice, so
no identity is on two sides. Canaries have coins of their own: fair, independent of one another and of `repeats`, as
one-run auditing asks for (Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, 2023).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from geoquant.data.domains import DOMAINS
from geoquant.data.grammar import Domain, Draft, spans, write
from geoquant.data.records import Canary, Record, Split
from geoquant.errors import UserError, unknown_name

__all__ = [
    "CANARIES",
    "DIGITS",
    "HOLDOUT",
    "REPEATS",
    "SIDES",
    "MadeRecords",
    "flip_sides",
    "plant",
    "synthetic_records",
]

SIDES = {"m": "members", "n": "nonmembers", "h": "holdout"}
HOLDOUT = 0.2  # share of the records that is held out; a fair coin splits the others
SMALLEST = 100  # fewer records could leave a side with less than the ten that an audit needs
LARGEST = 50_000  # each has a phone number of its own at most, and there are 78,900
MOST_CANARIES = 10_000
CANARIES, DIGITS, REPEATS = 64, 6, (1, 2, 4, 8)


@dataclass(frozen=True)
class MadeRecords:
    """The sides of one split, all canaries (their coin is `canary.included`), and what they were made from.

    sides: a letter of SIDES for each record in the order of the making. arguments: what the maker was called with,
    beyond domain and seed. notes: what a statement should add.
    """

    domain: str
    seed: int
    sides: str
    members: tuple[Record, ...]
    nonmembers: tuple[Record, ...]
    holdout: tuple[Record, ...]
    canaries: tuple[Record, ...]
    arguments: dict = field(default_factory=dict)
    notes: dict = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """What an audit compares: both sides, and the canaries, planted and withheld."""
        planted, withheld = (tuple(r for r in self.canaries if bool(r.repeats) == wanted) for wanted in (True, False))
        return Split(self.members, self.nonmembers, planted, withheld)

    @property
    def training(self) -> tuple[Record, ...]:
        """One epoch: every member once, every planted canary `repeats` times, in an order drawn from the seed."""
        lines = [record for record in (*self.members, *self.canaries) for _ in range(record.repeats)]
        chance(self.domain, self.seed, "order").shuffle(lines)
        return tuple(lines)


def synthetic_records(
    domain: str,
    n: int,
    seed: int = 0,
    *,
    canaries: int = CANARIES,
    digits: int = DIGITS,
    repeats: Sequence[int] = REPEATS,
) -> MadeRecords:
    """`n` records of a domain on three sides, and `canaries` planted secrets of `digits` digits, `repeats` in turn.

    The same arguments give the same records, under the same version of geoquant and of Faker's list of names.
    Raises UserError for an unknown domain and for numbers out of range.
    """
    if domain not in DOMAINS:
        raise unknown_name("domain", domain, DOMAINS)
    if not SMALLEST <= n <= LARGEST:
        raise UserError(f"cannot make {n} records", wanted=f"{SMALLEST} to {LARGEST}")
    grammar, seen = DOMAINS[domain], set()
    rng = chance(domain, seed, "records")
    records = [_record(Draft(grammar, rng, seen)) for _ in range(n)]
    sides = flip_sides(n, chance(domain, seed, "sides"))
    planted = plant(grammar, canaries, seed, seen, digits=digits, repeats=repeats)
    arguments = {"n": n, "canaries": canaries, "digits": digits, "repeats": list(repeats)}
    return MadeRecords(domain, seed, sides, *by_side(records, sides), planted, arguments)


def chance(domain: str, seed: int, purpose: str) -> random.Random:
    """A source of chance of its own for each purpose. Raises UserError for a negative seed."""
    if seed < 0:
        raise UserError(f"cannot use seed {seed}", wanted="a whole number from 0")
    return random.Random(f"geoquant/{domain}/{seed}/{purpose}")


def flip_sides(n: int, rng: random.Random) -> str:
    """A letter of SIDES for each of `n`, drawn independently."""
    return "".join("h" if rng.random() < HOLDOUT else rng.choice("mn") for _ in range(n))


def by_side(records: Sequence[Record], sides: str) -> list[tuple[Record, ...]]:
    """The records of each side, in the order of SIDES."""
    return [tuple(r for r, own in zip(records, sides, strict=True) if own == side) for side in SIDES]


def plant(
    grammar: Domain,
    n: int,
    seed: int,
    seen: set[str],
    *,
    digits: int = DIGITS,
    repeats: Sequence[int] = REPEATS,
) -> tuple[Record, ...]:
    """`n` canaries of uniformly random digits, each included by a fair coin. `seen`: identities that are taken.

    Raises UserError for numbers out of range.
    """
    if not 0 <= n <= MOST_CANARIES:
        raise UserError(f"cannot make {n} canaries", wanted=f"0 to {MOST_CANARIES}")
    if not 1 <= digits <= 30:
        raise UserError(f"cannot make secrets of {digits} digits", wanted="1 to 30")
    if not repeats or min(repeats) < 1:
        raise UserError(f"cannot repeat canaries {tuple(repeats)} times", wanted="positive whole numbers")
    rng, coins = chance(grammar.name, seed, "canaries"), chance(grammar.name, seed, "coins")
    planted = []
    for index in range(n):
        draft = Draft(grammar, rng, seen)
        draft.facts["secret"] = "".join(rng.choices("0123456789", k=digits))
        text, places = write(draft, "canary")
        included = bool(coins.getrandbits(1))
        canary = Canary(f"canary-{index + 1}", *places["secret"], repeats[index % len(repeats)], included)
        planted.append(Record(text.rstrip(), (), canary))
    return tuple(planted)


def _record(draft: Draft) -> Record:
    text, places = write(draft)
    return Record(text.rstrip(), spans(draft.domain, places))
