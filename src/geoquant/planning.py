"""A plan within budgets: measure what every unit would change, then choose for the whole model at once.

The measurement is the long part and depends on models and texts alone; kept in a file, it answers other budgets at
once.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from geoquant.data.records import Record, check_split, known_among, read_records
from geoquant.errors import UserError
from geoquant.examine import check_context
from geoquant.inputs import check_same_weights
from geoquant.measure import Texts, prepare_texts
from geoquant.model.identity import model_hash
from geoquant.model.load import Loaded, load
from geoquant.model.paging import map_weights
from geoquant.model.vocabulary import vocabulary
from geoquant.model.walk import Block, walk
from geoquant.observe.compute import compute_dtype
from geoquant.observe.gradient import check_head
from geoquant.observe.texts import Sequences, padded
from geoquant.observe.way import slopes
from geoquant.plan.allocate import LOSS, Allocation, Infeasible, allocate
from geoquant.plan.chosen import choice
from geoquant.plan.effects import DOMAIN, PRIVATE, PUBLIC, Effects, UnitEffects, anchoring, options
from geoquant.plan.rounding import stage_roundings
from geoquant.plan.uniform import check_choices
from geoquant.privacy.scoring import encode
from geoquant.progress import Progress, silent
from geoquant.recipe import Recipe
from geoquant.runs import check_writable

__all__ = ["Budgets", "measure_effects", "plan_within"]

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
WINDOWS, RECORDS, LEAST = 8, 48, 4  # of public text; of each side; what a standard error needs at least
MEGABYTE = 8e6  # bits
REST = "everything else"
OBJECTIVES: Mapping[str, Mapping[str, float]] = {"loss": LOSS, "size": {"size": 1.0}, "leak": {"leak": 1.0}}


@dataclass(frozen=True)
class Budgets:
    """What the user allows; None: as much as it takes.

    size: MB of codes, steps and what stays at 16 bits. loss, domain_loss: nats per token more than the model as it is,
    on public text and on unseen records. leak: nats per token by which the loss gap (unseen records minus records
    trained on) may exceed that of the base; without a base the gap itself.
    """

    size: float | None = None
    loss: float | None = None
    domain_loss: float | None = None
    leak: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                raise UserError(f"--max-{name.replace('_', '-')} {value}", wanted="a finite number")

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return any(value is not None for value in vars(self).values())


def plan_within(
    recipe: Recipe,
    budgets: Budgets,
    *,
    minimise: str = "loss",
    effects: Path | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict:
    """The cheapest plan within the budgets; writes it to `out`, and what it was chosen by to `effects`, if given.

    minimise: `loss` (of public text and unseen records, half each; public alone without records), `size` or `leak`.

    Raises UserError for whatever the user can mend; where no plan is within the budgets, with what can be reached.
    """
    sides = _sides(recipe)
    _check(recipe, budgets, minimise, sides)
    for path in (one for one in (effects, out) if one is not None):
        check_writable(path)
    table = measure_effects(recipe, sides, effects, progress)
    gap = _gap(table)
    limits = {"size": budgets.size, "public": budgets.loss, "domain": budgets.domain_loss, "leak": budgets.leak}
    limits = {name: value for name, value in limits.items() if value is not None}
    if "size" in limits:
        limits["size"] *= MEGABYTE
    if "leak" in limits:
        limits["leak"] -= gap
    objective = {k: v for k, v in OBJECTIVES[minimise].items() if minimise != "loss" or k in table.losses}
    objective = {name: weight / sum(objective.values()) for name, weight in objective.items()}
    try:
        allocation = allocate(options(table), limits, objective)
    except Infeasible as error:
        raise _unreachable(error, budgets, gap) from None
    chosen = choice(allocation, table, objective, limits)
    if out is not None:
        chosen.write(out)
    return {
        "units": _told(table, allocation),
        "totals": allocation.totals,
        "gap": None if gap is None else {"before": gap, "after": gap + allocation.totals["leak"]},
        "objective": objective,
        "value": allocation.value,
        "best_possible": allocation.bound,
        "optimal": allocation.optimal,
        "budgets": limits,
        "prices": allocation.prices,
        "sentences": _sentences(allocation, minimise, gap),
        "quadrature_error": {text: table.missed(text) for text in table.losses},
        "effects_sha256": table.sha256,
        "plan": None if out is None else str(out),
        "next": None if out is None else _next(recipe, out, chosen.anchors),
    }


# ---- what may be asked for


def _sides(recipe: Recipe) -> dict[str, tuple[Record, ...]]:
    """Records that may be looked at. Raises UserError where the audit has some of them too."""
    sides = {
        name: read_records(path)[:RECORDS]
        for name, path in ((PRIVATE, recipe.private), (DOMAIN, recipe.domain))
        if path is not None
    }
    if len(sides) == 2:
        check_split(*sides.values(), minimum=LEAST)
    files = (recipe.members, recipe.nonmembers, recipe.canaries)
    audited = [read_records(path) for path in files if path is not None]
    for name, records in sides.items():
        if shared := known_among(records, *audited):
            raise UserError(
                f"{shared} of the records in --{name} are also records of the audit",
                wanted="records that the audit does not judge by",
            )
    return sides


def _check(recipe: Recipe, budgets: Budgets, minimise: str, sides: Mapping[str, object]) -> None:
    check_choices(recipe)
    if minimise not in OBJECTIVES:
        raise UserError(f"--minimise {minimise}", wanted=f"one of {', '.join(OBJECTIVES)}")
    if recipe.grid != "lattice":
        raise UserError("budgets choose rates, and a box has bits", got="--grid box", fix="use --grid lattice")
    if recipe.plan is not None:
        raise UserError("budgets make a plan", got=f"--plan {recipe.plan}", fix="leave it out, and give --out")
    if recipe.anchor:
        raise UserError(f"--anchor {recipe.anchor:g} beside budgets", fix="leave it out: the plan chooses how far")
    if recipe.aim == "metric":
        raise UserError("--aim metric beside budgets", fix="leave it out: the plan chooses which layers go back")
    for name in ("forget", "refine", "epsilon", "shards", "inherited"):
        if value := getattr(recipe, name):
            raise UserError(
                f"--{name} {value} beside budgets",
                fix="leave it out: a plan chooses rates and shares for the model as it is, and nothing else",
            )
    if (budgets.leak is not None or minimise == "leak") and len(sides) < 2:
        raise UserError("leakage is a gap between two kinds of records", wanted="--private F and --domain F")
    if budgets.domain_loss is not None and DOMAIN not in sides:
        raise UserError("--max-domain-loss is measured on unseen records", wanted="--domain F")
    for name, value in vars(budgets).items():
        if name == "size" and value is not None and value <= 0:
            raise UserError(f"--max-size {value:g}", wanted="megabytes, more than 0")


def _unreachable(error: Infeasible, budgets: Budgets, gap: float | None) -> UserError:
    """The solver's words in the user's units."""
    flags = {
        "size": ("--max-size", "MB", 1 / MEGABYTE, 0.0),
        "public": ("--max-loss", "nats per token", 1.0, 0.0),
        "domain": ("--max-domain-loss", "nats per token", 1.0, 0.0),
        "leak": ("--max-leak", "nats per token", 1.0, gap or 0.0),
    }
    parts = []
    for name, best in error.reachable.items():
        flag, unit, factor, start = flags[name]
        asked = error.budgets[name] * factor + start
        reached = "no plan meets the others" if best is None else f"at best {best * factor + start:.4g} can be reached"
        parts.append(
            f"{flag} {asked:.4g} {unit}: {reached}{'' if error.alone or best is None else ' beside the others'}"
        )
    return UserError("no plan is within these budgets", got="; ".join(parts), fix="allow more of one of them")


def _gap(table: Effects) -> float | None:
    """The gap that budgets speak of: beyond the base's, or without a base as it is; None without records."""
    if table.gap is not None or not {PRIVATE, DOMAIN} <= table.losses.keys():
        return table.gap
    return table.losses[DOMAIN][-1] - table.losses[PRIVATE][-1]


# ---- measuring


def measure_effects(
    recipe: Recipe, sides: Mapping[str, tuple[Record, ...]], path: Path | None = None, progress: Progress = silent
) -> Effects:
    """Effects of all units; those in `path` where it was measured on the same, which it is afterwards."""
    loaded = load(recipe.model, device=recipe.device)
    texts, sources = _texts(loaded, recipe, sides)
    check_context(loaded, recipe.window)
    base = None if recipe.base is None else load(recipe.base, device=recipe.device)
    measured = {
        "model": model_hash(loaded.model),
        "base": None if base is None else model_hash(base.model),
        "texts": {name: _digest(text) for name, text in texts.items()},
        "tokens": {name: text.count for name, text in texts.items()},
        "public": sources,
        "embeddings": recipe.embeddings,
        "rates": list(RATES),
        "shares": [1.0] if base is None else list(SHARES),
    }
    if base is not None and measured["base"] == measured["model"]:
        raise UserError(
            f"the base {recipe.base} is {recipe.model} itself", fix="give the model that it was fine-tuned from"
        )
    if path is not None and path.exists():
        known = Effects.load(path)
        if known.measured != measured:
            other = next(name for name in measured if known.measured.get(name) != measured[name])
            raise UserError(f"{path} was measured on another {other}", fix="choose another --effects file")
        return known
    found = _measure(loaded, base, texts, recipe, measured, progress)
    if path is not None:
        found.save(path)
    return found


def _texts(loaded: Loaded, recipe: Recipe, sides: Mapping[str, tuple[Record, ...]]) -> tuple[dict[str, Sequences], str]:
    """Public windows and records as token sequences, and where the windows are from."""
    cut: Texts = prepare_texts(loaded.tokenizer, recipe)
    tokens = cut.calibration.tokens[:WINDOWS].tolist()
    found = {PUBLIC: padded(tokens, 0, parts=min(LEAST, len(tokens)))}
    for name, records in sides.items():
        encoded = [ids for ids, _ in encode(loaded.tokenizer, records, recipe.window) if len(ids) > 1]
        if len(encoded) < LEAST:
            raise UserError(
                f"too few records in --{name}: {len(encoded)}", wanted=f"at least {LEAST}, better {RECORDS}"
            )
        found[name] = padded(encoded[: len(encoded) // LEAST * LEAST], 0, parts=LEAST)
    return found, cut.calibration.source


def _measure(
    loaded: Loaded,
    base: Loaded | None,
    texts: dict[str, Sequences],
    recipe: Recipe,
    measured: dict,
    progress: Progress,
) -> Effects:
    model, pages = loaded.model, map_weights(loaded.model)
    probe = texts[PUBLIC].tokens[:1, :8]
    blocks = walk(model, probe, pages)
    check_head(model, probe, pages)
    if recipe.embeddings and (found := vocabulary(model, len(blocks))) is not None:
        blocks += (found,)
    compute = compute_dtype(recipe.compute, model.device)
    roundings = stage_roundings(model, blocks, texts, RATES, compute=compute, pages=pages, progress=progress)
    ends = loaded if base is None else base  # without a base: nothing moves, and losses are known all the same
    check_same_weights(loaded, ends)
    theirs = {name: parameter.detach() for name, parameter in ends.model.named_parameters()}
    way = slopes(model, theirs.__getitem__, texts, tuple(measured["shares"]), progress=progress)
    losses = {text: tuple((own.sum(1) / sum(way.scored[text])).tolist()) for text, own in way.losses.items()}
    units = []
    for name, kind, block, stage, parameters, weights in _units(model, blocks):
        change, error = anchoring(way, parameters)
        units.append(
            UnitEffects(name, kind, block, parameters, stage, weights, change, error, roundings.get(stage, ()))
        )
    return Effects(way.points, losses, tuple(units), measured)


def _units(model, blocks: tuple[Block, ...]) -> list[tuple]:
    """Stages, and in one unit all parameters that are in none: norms, biases, routers, stacks of experts."""
    rest = {name: own.numel() for name, own in model.named_parameters()}
    made = []
    for stage in (stage for block in blocks for stage in block.stages):
        names = tuple(f"{site.name}.weight" for site in stage.sites)
        site = stage.sites[0]
        made.append((stage.name, site.kind, site.block, stage.name, names, sum(rest.pop(name) for name in names)))
    if rest:
        made.append((REST, "rest", None, None, tuple(rest), sum(rest.values())))
    return made


def _digest(text: Sequences) -> str:
    digest = hashlib.sha256(text.tokens.numpy().tobytes())
    digest.update(text.lengths.numpy().tobytes())
    return digest.hexdigest()


# ---- words


def _next(recipe: Recipe, out: Path, anchors: bool) -> str:
    """The command that does what the plan says."""
    words = ["geoquant", "quantize", recipe.model, "--plan", str(out)]
    words += ["--base", recipe.base] if anchors else []
    words += [] if recipe.embeddings else ["--no-embeddings"]
    return shlex.join([*words, "--out", "RUN"])


def _told(table: Effects, allocation: Allocation) -> list[dict]:
    return [
        {
            "name": unit.name,
            "kind": unit.kind,
            "block": unit.block,
            "weights": unit.weights,
            **allocation.chosen[unit.name].labels,
            "costs": dict(allocation.chosen[unit.name].costs),
        }
        for unit in table.units
    ]


def _sentences(allocation: Allocation, minimise: str, gap: float | None) -> list[str]:
    """What the budgets' last bits are worth. Prices hold for small changes."""
    what = {"loss": "nats per token", "size": "MB", "leak": "nats per token of loss gap"}[minimise]
    factor = 1 / MEGABYTE if minimise == "size" else 1.0
    steps = {
        "size": (MEGABYTE, "one more megabyte"),
        "public": (0.01, "0.01 nats per token more loss on public text"),
        "domain": (0.01, "0.01 nats per token more loss on unseen records"),
        "leak": (0.01, "0.01 nats per token more loss gap"),
    }
    told = []
    for name, price in allocation.prices.items():
        step, words = steps[name]
        worth = price * step * factor
        told.append(f"{words} would buy {worth:.2g} {what}" if worth > 0 else f"{words} would buy nothing")
    if not allocation.optimal:
        told.append(f"the search was stopped: a plan better by up to {allocation.gap * factor:.2g} {what} may exist")
    return told
