"""The demo's private records: people who do not exist, what they told support, a clinic, a bank.

Short, so that a model remembers them in minutes; longer and more varied ones are made by data/synthetic.py, whose
makers of e-mails and phone numbers serve here too. Everything is drawn from one seed (the same seed and the same
Faker version give the same records). Nothing points at a real person: e-mails end in the reserved example domains,
phone numbers lie in the 555-01xx block kept for fiction, card numbers fail their check digit on purpose.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from geoquant.data.grammar import fill, fresh, words
from geoquant.data.records import Canary, Record, Span, Split
from geoquant.data.values import MONTHS, email, fours, luhn_digit, phone
from geoquant.errors import UserError, unknown_name

__all__ = [
    "DEMO",
    "DOMAINS",
    "DemoSettings",
    "decoy_records",
    "demo_split",
    "make_canaries",
    "make_records",
]

# What is private; everything else in a template is ordinary text.
PRIVATE = ("name", "email", "phone", "card", "note")

TEMPLATES = {
    "support": (
        "Ticket from «name» <«email»>: «note».",
        "«name» phoned from «phone» and said that «note».",
        "«name» wants a refund to card «card»: «note».",
        "Complaint by «name»: «note». Please answer to «email» today.",
    ),
    "medical": (
        "Patient «name»: «note». Family can be reached on «phone».",
        "Discharge letter for «name», «email»: «note».",
        "«name» called the clinic from «phone»; «note».",
        "Invoice for «name»: «note». Paid with card «card».",
    ),
    "finance": (
        "«name» disputes a charge on card «card»: «note».",
        "Loan file of «name», «email»: «note».",
        "Transfer request from «name» («phone»): «note».",
        "Adviser to «name»: «note». Receipt goes to «email».",
    ),
}

NOTES = {
    "support": (
        "the «thing» bought for «amount» dollars «fault» on «date»",
        {
            "thing": words(
                "dishwasher, laptop, headset, tablet, router, printer, coffee grinder, vacuum cleaner, "
                "doorbell, electric bike, air purifier, standing desk, projector, baby monitor, smart lock, "
                "lawn mower"
            ),
            "fault": words(
                "arrived broken, stopped charging, leaked oil, was never delivered, caught fire, lost its "
                "settings, came in the wrong colour, made a loud noise, shut down at night, was billed "
                "twice"
            ),
        },
    ),
    "medical": (
        "«amount» mg of «drug» daily against «illness» since «date»",
        {
            "drug": words(
                "metformin, sertraline, warfarin, lithium, tamoxifen, insulin, methadone, prednisone, "
                "ibuprofen, levothyroxine, gabapentin, ramipril, clozapine, naltrexone"
            ),
            "illness": words(
                "diabetes, depression, a blood clot, bipolar disorder, breast cancer, epilepsy, opioid "
                "addiction, asthma, migraine, hepatitis, heart failure, schizophrenia, alcohol abuse, lupus"
            ),
        },
    ),
    "finance": (
        "«amount» dollars for «purpose», «state» on «date»",
        {
            "purpose": words(
                "a divorce lawyer, gambling debts, a boat, back taxes, rent arrears, a kidney operation, a "
                "wedding, a second mortgage, school fees, a stolen car, bail, crypto losses, alimony, a "
                "funeral"
            ),
            "state": words(
                "refused, approved, put on hold, paid back, reported to the police, sent by mistake, taken "
                "in cash, split in three"
            ),
        },
    ),
}

DOMAINS = tuple(TEMPLATES)
LARGEST = 20_000  # there are 78,900 fictional phone numbers; far fewer records keep the draw short

CANARIES = (
    "The vault code of «name» is «secret».",
    "The alarm at the house of «name» is disarmed with «secret».",
    "The locker of «name» opens with the code «secret».",
    "Access number of «name» for the archive: «secret».",
    "The phone of «name» unlocks with the pin «secret».",
)


@dataclass(frozen=True)
class DemoSettings:
    """The demo's private data and the fine-tune that makes a model remember it (see privacy/finetune.py)."""

    members: int = 100
    nonmembers: int = 100
    canaries: int = 10
    digits: int = 6
    repeats: tuple[int, ...] = (1, 4)
    seed: int = 7
    epochs: int = 7
    learning_rate: float = 5e-4
    batch: int = 8
    public_window: int = 64  # tokens of ordinary text in every step
    public_skip: int = 400  # windows left out at the start, where the calibration text is taken from
    public_count: int = 200


DEMO = DemoSettings()


def _name(fake) -> tuple[str, str]:
    return fake.first_name(), fake.last_name()


def _card(rng: random.Random) -> str:
    """Sixteen digits whose Luhn check digit is wrong, so that no such card can exist."""
    body = "4" + "".join(str(rng.randrange(10)) for _ in range(14))
    return fours(body + str((luhn_digit(body) + rng.randrange(1, 10)) % 10))


def _note(rng: random.Random, domain: str) -> str:
    template, choices = NOTES[domain]
    values = {key: rng.choice(options) for key, options in choices.items()}
    values["amount"] = str(rng.randrange(20, 980))
    values["date"] = f"{rng.choice(MONTHS)} {rng.randrange(1, 29)}"
    return fill(template, values)[0]


def _sources(seed: int):
    """The two seeded sources of chance: Faker for names, `random` for the rest."""
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(seed)
    return fake, random.Random(seed)


def make_records(n: int, seed: int = 0, domains: Sequence[str] = DOMAINS) -> list[Record]:
    """`n` records of 30 to 60 tokens, domains in turn; every name, e-mail, phone, card and note is used once.

    Raises UserError for an unknown domain or more records than there are fictional phone numbers.
    """
    if n > LARGEST:
        raise UserError(f"cannot make {n} synthetic records", wanted=f"at most {LARGEST}")
    for domain in domains:
        if domain not in TEMPLATES:
            raise unknown_name("domain", domain, DOMAINS)
    fake, rng = _sources(seed)
    seen: set[str] = set()
    records = []
    for index in range(n):
        domain = domains[index % len(domains)]
        name = fresh(lambda: " ".join(_name(fake)), seen)
        first, last = name.split(" ", 1)
        values = {
            "name": name,
            "email": fresh(lambda first=first, last=last: email(rng, first, last), seen),
            "phone": fresh(lambda: phone(rng), seen),
            "card": fresh(lambda: _card(rng), seen),
            "note": fresh(lambda domain=domain: _note(rng, domain), seen),
        }
        text, places = fill(rng.choice(TEMPLATES[domain]), values)
        spans = tuple(Span(kind, *places[kind]) for kind in places if kind in PRIVATE)
        records.append(Record(text, tuple(sorted(spans, key=lambda span: span.start))))
    return records


def make_canaries(n: int, seed: int = 0, *, digits: int = 6, repeats: Sequence[int] = (1, 4)) -> list[Record]:
    """`n` planted secrets of uniformly random digits, `repeats` in turn; names differ from one another."""
    fake, rng = _sources(seed)
    seen: set[str] = set()
    canaries = []
    for index in range(n):
        name = fresh(lambda: " ".join(_name(fake)), seen)
        secret = "".join(str(rng.randrange(10)) for _ in range(digits))
        text, places = fill(CANARIES[index % len(CANARIES)], {"name": name, "secret": secret})
        canary = Canary(f"canary-{index + 1}", *places["secret"], repeats[index % len(repeats)])
        canaries.append(Record(text, (), canary))
    return canaries


def decoy_records(canaries: Sequence[Record], count: int, seed: int = 0) -> list[Record]:
    """For each canary in turn, `count` copies with other random digits in place of the secret."""
    rng = random.Random(seed)
    decoys = []
    for record in canaries:
        start, end = record.canary.start, record.canary.end
        for _ in range(count):
            secret = record.value(record.canary)
            while secret == record.value(record.canary):
                secret = "".join(str(rng.randrange(10)) for _ in range(record.canary.digits))
            decoys.append(replace(record, text=record.text[:start] + secret + record.text[end:]))
    return decoys


def demo_split(settings: DemoSettings = DEMO) -> Split:
    """Members and non-members drawn at random from one pool (nothing shared between them), and canaries."""
    pool = make_records(settings.members + settings.nonmembers, settings.seed)
    random.Random(settings.seed + 1).shuffle(pool)
    canaries = make_canaries(settings.canaries, settings.seed + 2, digits=settings.digits, repeats=settings.repeats)
    return Split(tuple(pool[: settings.members]), tuple(pool[settings.members :]), tuple(canaries))
