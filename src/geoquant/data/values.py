"""Makers of the private values in synthetic records: right in form, and certain to belong to nobody.

E-mails end in the example domains of RFC 2606, hosts too; phone numbers lie in the 555-01xx block kept for fiction;
addresses have invented towns and ZIP codes below 00500, which are not assigned; network addresses are those of RFC
5737. Card numbers pass the Luhn check and begin with 9999: 9 stands for numbers that a country gives out, 999 for a
country that ISO 3166 leaves to users, so no payment network has them. Accounts are IBANs of ZZ, no country either.
Whatever else counts things (orders, patients, keys) says SYN.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from functools import cache

from geoquant.data.grammar import Draft, words

__all__ = [
    "MONTHS",
    "NOUNS",
    "PERSON",
    "email",
    "fours",
    "host",
    "luhn_digit",
    "network_address",
    "number",
    "password",
    "phone",
    "token",
]

MONTHS = words("January, February, March, April, May, June, July, August, September, October, November, December")
TOWNS = (
    words("Alder, Brindle, Cobble, Drum, Elm, Fallow, Gannet, Hazel, Inver, Juniper, Kestrel, Linden, Marl, Nettle"),
    words("ford, haven, mere, ridge, wick, stead, brook, minster, gate, holm, moor, combe"),
)
STREETS = words("Street, Avenue, Lane, Road, Court, Drive, Terrace, Way, Close, Crescent, Place, Square")
TREES = words(
    "Maple, Chestnut, Mill, Station, Harbour, Church, Quarry, Orchard, Meadow, Castle, Canal, Windmill, Abbey"
)
NOUNS = words(
    "otter, lantern, cobalt, pepper, violin, saddle, glacier, thimble, walnut, comet, turbine, magnet, velvet, "
    "anchor, biscuit, falcon, granite, hammock, ivory, jigsaw, kettle, lobster, marble, noodle, orchid, parrot, "
    "quartz, raisin"
)


@cache
def _names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """First and last names that Faker knows from the United States."""
    from faker.providers.person.en_US import Provider

    first = {*Provider.first_names_female, *Provider.first_names_male}
    return tuple(sorted(first)), tuple(sorted(set(Provider.last_names)))


def full_name(rng: random.Random) -> str:
    """First and last name, one time in four with an initial between them."""
    first, last = _names()
    initial = f" {rng.choice(string.ascii_uppercase)}." if rng.random() < 0.25 else ""
    return f"{rng.choice(first)}{initial} {rng.choice(last)}"


def email(rng: random.Random, first: str, last: str) -> str:
    """An address made of a name and three digits."""
    local = rng.choice((f"{first}.{last}", f"{first[0]}{last}", f"{last}.{first}", f"{first}_{last[0]}"))
    local = "".join(letter for letter in local.lower() if letter.isalnum() or letter in "._")
    return f"{local}{rng.randrange(100, 1000)}@example.{rng.choice(('com', 'org', 'net'))}"


def phone(rng: random.Random) -> str:
    """One of 78,900 numbers kept for fiction, 212-555-0143."""
    return f"{rng.randrange(201, 990)}-555-01{rng.randrange(100):02d}"


def luhn_digit(body: str) -> int:
    """The digit that makes `body` and it pass the Luhn check: every second digit from the right counts twice."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in body[::-2])
    return -(doubled + sum(map(int, body[-2::-2]))) % 10


def card(rng: random.Random) -> str:
    """Sixteen digits that pass the Luhn check, in a range that no payment network has."""
    body = f"9999{rng.randrange(10**11):011d}"
    return fours(f"{body}{luhn_digit(body)}")


def account(rng: random.Random) -> str:
    """An IBAN of the country ZZ, bank SYNT, with its two check digits (ISO 13616, mod 97)."""
    own = f"SYNT{rng.randrange(10**12):012d}"
    check = 98 - int("".join(str(int(letter, 36)) for letter in f"{own}ZZ00")) % 97
    return fours(f"ZZ{check:02d}{own}")


def fours(digits: str) -> str:
    """In groups of four."""
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def address(rng: random.Random) -> str:
    """House, street, invented town, ZIP code that is not assigned."""
    street = f"{rng.choice((*TREES, *_names()[1]))} {rng.choice(STREETS)}"
    town = rng.choice(TOWNS[0]) + rng.choice(TOWNS[1])
    return f"{rng.randrange(1, 400)} {street}, {town} {rng.randrange(500):05d}"


def date(rng: random.Random, first: int, last: int) -> str:
    """A day of the years `first` to `last`, in one of three spellings; no month is longer than 28 days."""
    year, month, day = rng.randint(first, last), rng.randrange(12), rng.randint(1, 28)
    return rng.choice(
        (f"{year}-{month + 1:02d}-{day:02d}", f"{MONTHS[month]} {day}, {year}", f"{day} {MONTHS[month]} {year}")
    )


def amount(rng: random.Random) -> str:
    """Dollars and cents, small sums more often than large ones."""
    return f"${int(10 ** rng.uniform(1, 4)):,}.{rng.randrange(100):02d}"


def number(prefix: str) -> Callable[[Draft], str]:
    """A fact: prefix, SYN, eight digits."""
    return lambda draft: draft.fresh(lambda rng: f"{prefix}-SYN-{rng.randrange(10**8):08d}")


def token(rng: random.Random) -> str:
    """An API key of 24 letters and digits."""
    return "syn_" + "".join(rng.choices(string.ascii_letters + string.digits, k=24))


def password(rng: random.Random) -> str:
    """Two words and digits, or twelve characters at random."""
    if rng.random() < 0.5:
        return f"{rng.choice(NOUNS).title()}{rng.choice('-_.!')}{rng.choice(NOUNS)}{rng.randrange(1000, 10000)}"
    return "".join(rng.choices(string.ascii_letters + string.digits + "!%*+-_", k=12))


def host(rng: random.Random) -> str:
    """A machine of an example domain."""
    role = rng.choice(words("db, cache, api, queue, auth, mail, build, metrics, files, ledger, search, vpn"))
    domain = f"example.{rng.choice(('com', 'org', 'net'))}"
    return f"{role}-{rng.choice(NOUNS)}-{rng.randrange(10, 1000)}.{domain}"


def network_address(rng: random.Random) -> str:
    """An IPv4 address of the blocks kept for documentation."""
    return f"{rng.choice(('192.0.2', '198.51.100', '203.0.113'))}.{rng.randrange(1, 255)}"


def _email(draft: Draft) -> str:
    return draft.fresh(lambda rng: email(rng, draft.fact("first"), draft.fact("last")))


# Facts of a person, the same in every domain.
PERSON: dict[str, Callable[[Draft], str]] = {
    "name": lambda draft: draft.fresh(full_name),
    "first": lambda draft: draft.fact("name").split()[0],
    "last": lambda draft: draft.fact("name").split()[-1],
    "email": _email,
    "phone": lambda draft: draft.fresh(phone),
    "card": lambda draft: draft.fresh(card),
    "account": lambda draft: draft.fresh(account),
    "address": lambda draft: draft.fresh(address),
    "birth": lambda draft: date(draft.rng, 1935, 2004),
    "date": lambda draft: date(draft.rng, 2019, 2025),
    "amount": lambda draft: amount(draft.rng),
}
