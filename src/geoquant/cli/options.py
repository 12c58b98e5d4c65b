"""Options that several commands share, and the way from flags to a `Recipe`.

Every flag of a recipe is None when it was not given, so that what a `--recipe FILE` says is overruled only by
what stands on the command line. The defaults live in `geoquant.recipe.Recipe`; a test holds the help to them.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cyclopts import Token

    from geoquant.recipe import Recipe

__all__ = ["WHOLE", "AnyModel", "Base", "Device", "Domain", "Json", "Model", "Private", "RecipeFlags", "command_line"]


def whole_number(_: object, tokens: Sequence[Token]) -> int:
    """A flag's value as it was typed; the parser itself would round 3.5 to 4."""
    typed = tokens[0].value
    try:
        return int(typed)
    except ValueError:
        raise ValueError(f'unable to convert "{typed}" into a whole number') from None


WHOLE = Parameter(converter=whole_number)

Model = Annotated[str, Parameter(help="Hugging Face folder, hub id, .gguf file, or `demo`.")]
AnyModel = Annotated[
    str, Parameter(help="Run folder, Hugging Face folder (packed too), hub id, .gguf file, or `demo`.")
]
Json = Annotated[
    bool,
    Parameter(
        name="--json",
        help="One JSON object on stdout; everything else goes to stderr.",
        show_default=False,
        group="Output",
    ),
]
Base = Annotated[str | None, Parameter(help="Public model it was fine-tuned from.")]
Private = Annotated[str | None, Parameter(help="Records the model was trained on, .jsonl with a text field.")]
Domain = Annotated[str | None, Parameter(help="Records of the same kind that it never saw, .jsonl.")]
Device = Annotated[str, Parameter(help="Where to compute: cpu, cuda, cuda:1.")]


def command_line() -> str:
    """The command as it was typed, for the record."""
    return shlex.join(["geoquant", *sys.argv[1:]])


def option(help_: str, *, group: str, negative: str | None = None, name: str | None = None) -> Parameter:
    """One recipe flag."""
    return Parameter(name=name, help=help_, group=group, negative=negative or ())


GRID, SOLVER, TEXT, CONTROL, PRIVACY, FILES = (
    "Grid",
    "Metric and solver",
    "Texts",
    "Control of what is revealed",
    "Audit on private records",
    "Files and machine",
)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """The recipe's fields as flags; None means not given."""

    grid: Annotated[
        str | None,
        option(
            "lattice, or box where something of a box is given: unbounded codes, or of fixed width (default lattice).",
            group=GRID,
        ),
    ] = None
    rate: Annotated[
        float | None,
        option("Bits per weight of the lattice, all-in, 1.5 to 8 (default 3.25).", group=GRID),
    ] = None
    embeddings: Annotated[
        bool | None,
        option(
            "Whether a lattice codes embeddings and head too (default yes).", group=GRID, negative="--no-embeddings"
        ),
    ] = None
    foldable: Annotated[
        bool | None,
        option(
            "Whether column steps of a lattice fold into the layers before, as int8 readers need (default yes).",
            group=GRID,
            negative="--no-foldable",
        ),
    ] = None
    bits: Annotated[
        int | None, option("Bits per code of the box, 2 to 8 (default 4); asks for --grid box.", group=GRID), WHOLE
    ] = None
    group_size: Annotated[int | None, option("Input columns that share one scale (default 64).", group=GRID), WHOLE] = (
        None
    )
    symmetric: Annotated[
        bool | None,
        option(
            "Codes around zero, or with a zero point per group (default symmetric).",
            group=GRID,
            negative="--asymmetric",
        ),
    ] = None
    keep: Annotated[
        float | None, option("Share of input columns kept at 16 bits, 0 to 0.5 (default 0.0).", group=GRID)
    ] = None
    method: Annotated[
        str | None,
        option("How codes are chosen (default lattice-priced), in a box babai; `geoquant list methods`.", group=SOLVER),
    ] = None
    metric: Annotated[
        str | None,
        option("What error means: plain, clipped, gradient (default gradient).", group=SOLVER),
    ] = None
    gradient_share: Annotated[
        float | None,
        option("Share of the windows whose tokens are weighted by their gradient (default 0.25).", group=SOLVER),
    ] = None
    reference_share: Annotated[
        float | None,
        option("Share of the windows that show a site what it should compute (default 1.0).", group=SOLVER),
    ] = None
    row_block: Annotated[
        int | None, option("Rows of the lattice that are rounded one after another (default 64).", group=SOLVER), WHOLE
    ] = None
    order: Annotated[
        str | None,
        option("Column order: natural, activation, group-aware, min-pivot (default group-aware).", group=SOLVER),
    ] = None
    damping: Annotated[
        float | None,
        option("Share of the mean diagonal added to the metric (default: chosen per site).", group=SOLVER),
    ] = None
    static_scales: Annotated[
        bool | None, option("Freeze scales to the original weights (default false).", group=SOLVER)
    ] = None
    sequential: Annotated[
        str | None,
        option("Runtime inputs seen by each solve: off, block, site (default site).", group=SOLVER),
    ] = None
    target: Annotated[
        str | None,
        option(
            "What to come close to: weights, or outputs in full precision from runtime inputs (default outputs).",
            group=SOLVER,
        ),
    ] = None
    compute: Annotated[
        str | None,
        option("Type of the forward passes: auto, float32, bfloat16 (default auto).", group=SOLVER),
    ] = None
    moments: Annotated[
        str | None, option("Type moments are summed in: float32, float64 (default float32).", group=SOLVER)
    ] = None
    calibration: Annotated[
        str | None,
        option("Calibration text, .txt or .jsonl (default: the text every Python carries).", group=TEXT),
    ] = None
    windows: Annotated[int | None, option("Calibration windows (default 32).", group=TEXT), WHOLE] = None
    window: Annotated[int | None, option("Tokens per window (default 512).", group=TEXT), WHOLE] = None
    evaluation: Annotated[
        str | None,
        option(
            "Text that perplexity is measured on (default: the end of the text every Python carries).",
            group=TEXT,
            name="--text",
        ),
    ] = None
    evaluation_windows: Annotated[int | None, option("Windows measured (default 20).", group=TEXT), WHOLE] = None
    plan: Annotated[
        str | None,
        option(
            "Plan file of `geoquant plan MODEL --max-...`: bits of every layer, shares of its change.", group=CONTROL
        ),
    ] = None
    base: Annotated[str | None, option("Public model it was fine-tuned from.", group=CONTROL)] = None
    private: Annotated[
        str | None, option("Records the model was trained on that may be looked at, .jsonl.", group=CONTROL)
    ] = None
    domain: Annotated[
        str | None,
        option("Records of the same kind that it never saw, .jsonl.", group=CONTROL),
    ] = None
    anchor: Annotated[
        float | None,
        option("How far weights go back to the public base, 0 to 1 (default 0.0).", group=CONTROL),
    ] = None
    aim: Annotated[
        str | None,
        option(
            "Which go back: everything; memory, if --private and --domain are given; metric (default everything).",
            group=CONTROL,
        ),
    ] = None
    forget: Annotated[
        int | None,
        option("Passes that make --private no better known than --domain, before solving (default 0).", group=CONTROL),
        WHOLE,
    ] = None
    forget_weight: Annotated[
        float | None,
        option("Weight of private records against divergence in --forget (default 10.0).", group=CONTROL),
    ] = None
    epsilon: Annotated[
        float | None,
        option("Release all weights with noise that guarantees this, for --radius or --shards.", group=CONTROL),
    ] = None
    delta: Annotated[float | None, option("The delta of that guarantee (default: 1e-5).", group=CONTROL)] = None
    radius: Annotated[
        float | None,
        option("It holds for any two weight vectors within this distance; needs --base.", group=CONTROL),
    ] = None
    ball: Annotated[
        str | None,
        option("Distance: euclidean, or metric, of the base's inputs (default: euclidean).", group=CONTROL),
    ] = None
    shards: Annotated[
        list[str] | None,
        option(
            "It holds for one record: fine-tunes of MODEL on disjoint shards, folders or adapters, repeatable.",
            group=CONTROL,
        ),
    ] = None
    clip: Annotated[
        float | None, option("Largest length of a shard's change, in units of the weights.", group=CONTROL)
    ] = None
    inherited: Annotated[
        str | None,
        option("What whoever trained MODEL guarantees (DP-SGD), .json: passed through, no noise.", group=CONTROL),
    ] = None
    refine: Annotated[
        int | None,
        option("Passes that move solved codes by a step, for --private and --domain too (default 0).", group=CONTROL),
        WHOLE,
    ] = None
    refine_privacy: Annotated[
        float | None,
        option("Weight of private records against divergence in --refine (default 1.0).", group=CONTROL),
    ] = None
    refine_blocks: Annotated[
        int | None,
        option("Passes over each block alone, for its output, before those of --refine (default 0).", group=CONTROL),
        WHOLE,
    ] = None
    refine_geometry: Annotated[
        float | None,
        option(
            "Weight of rows whose distortion stands out against divergence in --refine (default 0.0).", group=CONTROL
        ),
    ] = None
    refine_threshold: Annotated[
        float | None,
        option("Distortion above which a row pays (default: the 90% quantile of its class).", group=CONTROL),
    ] = None
    refine_lowered: Annotated[
        float | None,
        option("Share by which rows of high public Fisher have a lower threshold (default 0.25).", group=CONTROL),
    ] = None
    members: Annotated[str | None, option("Records the model was trained on, .jsonl.", group=PRIVACY)] = None
    nonmembers: Annotated[
        str | None, option("Records of the same kind it was not trained on, .jsonl.", group=PRIVACY)
    ] = None
    canaries: Annotated[str | None, option("Canaries planted in the training data, .jsonl.", group=PRIVACY)] = None
    reference: Annotated[str | None, option("Public base model that calibrates the attack.", group=PRIVACY)] = None
    formats: Annotated[
        list[str] | None,
        option(
            "Export, repeatable, see `geoquant list formats` (default geoquant); of a box: compressed-tensors.",
            group=FILES,
            name="--format",
        ),
    ] = None
    verify: Annotated[
        bool | None,
        option(
            "Reload the export in a fresh process and compare (default verify).",
            group=FILES,
            name="--verify",
            negative="--no-verify",
        ),
    ] = None
    seed: Annotated[int | None, option("Seed of the audit's bootstrap (default 0).", group=FILES), WHOLE] = None
    device: Annotated[str | None, option("cpu, cuda, cuda:1 (default cpu).", group=FILES)] = None

    def given(self) -> dict[str, object]:
        """Only what stands on the command line."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None
        }

    def recipe(self, model: str | None, file: Path | None) -> Recipe:
        """The validated recipe: the file's values, overruled by the flags. Raises UserError."""
        from geoquant.errors import UserError
        from geoquant.recipe import checked, load_recipe, refuse_idle

        values = self.given() | ({} if model is None else {"model": model})
        if file is None and model is None:
            raise UserError("no model given", wanted="MODEL or --recipe FILE", fix="for a first try: demo")
        found = checked(values) if file is None else load_recipe(file, **values)
        refuse_idle(found, values)
        return found
