"""The kinds of synthetic records there are: a file each, over one grammar (data/grammar.py)."""

from __future__ import annotations

from geoquant.data.domains.code import CODE
from geoquant.data.domains.finance import FINANCE
from geoquant.data.domains.medical import MEDICAL
from geoquant.data.domains.support import SUPPORT

__all__ = ["DOMAINS"]

DOMAINS = {domain.name: domain for domain in (SUPPORT, MEDICAL, FINANCE, CODE)}
