"""What every unit of a model would change, measured before anything is decided.

Anchoring a unit to the share m of its change from the public base: the part of `L(w) - L(w_base)` that the straight
way's last stretch owes to the unit (observe/way.py),

    change_u(m) = - integral_m^1 <grad_u L(w_base + t (w - w_base)), w_u - w_base_u> dt,

by the trapezoid rule between the points at which slopes were taken. Over all units the changes add up to the change of
the whole model at that share; where units get different shares they are the units' averages over all ways of sharing it
out along this way, and no more is claimed.

Rounding a unit at a rate: the rate forecast gives the step D (plan/rate.py); its error, of covariance
`D^2 a_i^2 / 12 (A_public + damping)^-1` in row i, costs on any text with its own Kronecker factors

    1/2 sum_i G_ii a_i^2 D^2 / 12 tr((A_public + damping)^-1 A)

to second order. The first-order term is left out: it has either sign, belongs to the few texts it is measured on and
not to the unit (outliers/first_order.py), and choosing by it would be choosing by chance.

Leakage is the loss gap: NLL of unseen records of the private kind minus NLL of records trained on, nats per token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch

from geoquant.errors import UserError
from geoquant.observe.way import Slopes
from geoquant.plan.allocate import Option, Unit
from geoquant.runs import read_json, write_json

__all__ = ["DOMAIN", "PRIVATE", "PUBLIC", "Effects", "Rounding", "UnitEffects", "anchoring", "options"]

PUBLIC, PRIVATE, DOMAIN = "public", "private", "domain"
FULL = 16.0  # bits of what is not rounded
SCHEMA = 1


@dataclass(frozen=True)
class Rounding:
    """A unit at `bits` per weight: change of NLL by text, nats per token; step: D of its lattice."""

    bits: float
    step: float
    change: Mapping[str, float]


@dataclass(frozen=True)
class UnitEffects:
    """parameters: its tensors; stage: what is solved as one, None for what is never rounded; weights: numbers in it.

    change, error: by text, for each of the table's shares, change of NLL in nats per token and its standard error over
    batches of the text; zero at share 1. rounding: in order of bits, empty where never rounded.
    """

    name: str
    kind: str
    block: int | None
    parameters: tuple[str, ...]
    stage: str | None
    weights: int
    change: Mapping[str, tuple[float, ...]]
    error: Mapping[str, tuple[float | None, ...]]
    rounding: tuple[Rounding, ...] = ()


@dataclass(frozen=True)
class Effects:
    """shares: ascending, the last is 1; only that without a base. losses: by text, NLL of the whole model at each
    share, nats per token. measured: on what (hashes of models and texts, settings).
    """

    shares: tuple[float, ...]
    losses: Mapping[str, tuple[float, ...]]
    units: tuple[UnitEffects, ...]
    measured: Mapping[str, object]

    @property
    def gap(self) -> float | None:
        """The loss gap of the model beyond that of its base (what was learned by heart, not how hard records are)."""
        if not {PRIVATE, DOMAIN} <= self.losses.keys() or self.shares[0] != 0:
            return None
        gaps = [self.losses[DOMAIN][end] - self.losses[PRIVATE][end] for end in (-1, 0)]
        return gaps[0] - gaps[1]

    def missed(self, text: str) -> float:
        """What the parts of all units lack to the whole change between the ends of the way: error of the quadrature."""
        whole = self.losses[text][0] - self.losses[text][-1]
        return math.fsum(unit.change[text][0] for unit in self.units) - whole

    @property
    def sha256(self) -> str:
        """Hash of everything in the table."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """As JSON, atomically."""
        write_json(path, {"schema": SCHEMA, "sha256": self.sha256, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Effects:
        """What `save` wrote. Raises UserError for anything else."""
        told = read_json(path, schema=int, sha256=str, shares=list, losses=dict, units=list, measured=dict)
        try:
            found = cls(
                shares=tuple(told["shares"]),
                losses={name: tuple(values) for name, values in told["losses"].items()},
                units=tuple(_unit(one) for one in told["units"]),
                measured=told["measured"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no table of effects: {error}", fix="measure it again") from None
        if told["schema"] != SCHEMA or found.sha256 != told["sha256"]:
            raise UserError(f"{path} is damaged or was changed: its hash is another", fix="measure it again")
        return found


def _unit(told: dict) -> UnitEffects:
    return UnitEffects(
        **{name: told[name] for name in ("name", "kind", "block", "stage", "weights")},
        parameters=tuple(told["parameters"]),
        change={name: tuple(values) for name, values in told["change"].items()},
        error={name: tuple(values) for name, values in told["error"].items()},
        rounding=tuple(Rounding(**one) for one in told["rounding"]),
    )


def anchoring(
    slopes: Slopes, parameters: Sequence[str]
) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[float | None, ...]]]:
    """Change of NLL by text when these parameters keep each of the points' shares, and its standard error.

    Parameters that are the same at both ends change nothing. One batch alone has no standard error: None.
    """
    change, error = {}, {}
    widths = torch.tensor(slopes.points, dtype=torch.float64).diff()
    for text, parts in slopes.parts.items():
        scored = torch.tensor(slopes.scored[text], dtype=torch.float64)
        own = [parts[name] for name in parameters if name in parts]
        slope = sum(own) if own else torch.zeros_like(slopes.losses[text])  # (points, batches)
        stretches = (slope[1:] + slope[:-1]) / 2 * widths[:, None]
        sums = -torch.cat([stretches.flip(0).cumsum(0).flip(0), torch.zeros_like(slope[:1])])
        mean = sums.sum(1) / scored.sum()
        count = len(scored)
        spread = (sums - mean[:, None] * scored).square().sum(1) * count / max(1, count - 1)
        change[text] = tuple(mean.tolist())
        error[text] = tuple((spread.sqrt() / scored.sum()).tolist()) if count > 1 else (None,) * len(mean)
    return change, error


def options(effects: Effects) -> list[Unit]:
    """What each unit may become, for `allocate`: every share with every rate.

    Costs: `size` in bits; `public`, `domain` change of NLL in nats per token; `leak` change of the loss gap. Labels:
    `share` of the change from the base that is kept, `bits` (None: never rounded). Only what was measured is a cost.
    """
    made = []
    for unit in effects.units:
        roundings = unit.rounding or (Rounding(FULL, 0.0, {}),)
        found = []
        # As it is comes first: of options that cost the same, the first one stays.
        for place, share in reversed([*enumerate(effects.shares)]):
            for rounding in roundings:
                change = {text: unit.change[text][place] + rounding.change.get(text, 0.0) for text in effects.losses}
                costs = {"size": rounding.bits * unit.weights}
                costs |= {text: change[text] for text in (PUBLIC, DOMAIN) if text in change}
                if PRIVATE in change and DOMAIN in change:
                    costs["leak"] = change[DOMAIN] - change[PRIVATE]
                bits = rounding.bits if unit.rounding else None
                found.append(Option(f"{bits or FULL:g} bits, share {share:g}", costs, {"share": share, "bits": bits}))
        made.append(Unit(unit.name, tuple(found)))
    return made
