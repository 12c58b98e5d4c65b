"""A model with a guarantee: all private weights pass through one mechanism before anything else happens to them.

What comes out takes the public base's place: its module tree, configuration, tokenizer and generation settings, with
every floating-point tensor (linear maps, embeddings, head, norms, biases; tied ones once) released. From there on the
private model is out of reach: metric, scales, order, allocation and kept columns are functions of the release and of
public text, and rounding is post-processing. A trainer's own guarantee (DP-SGD) needs no release and is passed through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.measure import Texts, prepare_texts
from geoquant.model.changes import Factors, FolderChanges, folder_changes
from geoquant.model.load import Loaded, load
from geoquant.privacy.guarantee.adjacency import OneRecord, WeightBall, euclidean, in_metric
from geoquant.privacy.guarantee.claim import Ball, Claim, Inherit, Shards, claim_of
from geoquant.privacy.guarantee.inherited import inherit
from geoquant.privacy.guarantee.metric import metric_factors
from geoquant.privacy.guarantee.noise import epsilon_with, sigma_for
from geoquant.privacy.guarantee.price import Price, price_of
from geoquant.privacy.guarantee.provenance import Origin, Private, Public, private
from geoquant.privacy.guarantee.shards import Change, LowRank, aggregating
from geoquant.privacy.guarantee.statement import Guarantee
from geoquant.privacy.guarantee.weight_ball import releasing
from geoquant.progress import Progress, silent
from geoquant.recipe import Recipe

__all__ = [
    "announced",
    "check_claim",
    "chosen_by",
    "claimed",
    "entry_of",
    "foretold",
    "inherited",
    "public_base",
    "release_model",
    "tensors_of",
    "with_guarantee",
]

# Options that take nothing from private data, or only for measuring. What is not listed is refused beside a claim: a
# lever that looks at private records, or at the private model, would void it.
HARMLESS = {
    *("model", "base", "epsilon", "delta", "radius", "ball", "shards", "clip", "inherited"),
    *("grid", "rate", "embeddings", "foldable", "method", "bits", "group_size", "symmetric", "keep", "metric"),
    *("gradient_share", "row_block", "order", "damping", "static_scales", "sequential", "target", "reference_share"),
    *("compute", "moments", "calibration", "windows", "window", "evaluation", "evaluation_windows"),
    *("members", "nonmembers", "canaries", "reference", "formats", "verify", "seed", "device"),
}
RECORDS = ("members", "nonmembers", "canaries")
NOT_SHIPPED = (
    "The run's own report and everything else in its folder but the exports: they name and measure the private model. "
    "Give away the exports alone."
)
UNSEEN = "No setting was chosen by looking at private data."
SIDE_FILES = "Configuration, tokenizer, chat template and generation settings are the public base's."


def claimed(recipe: Recipe) -> Claim | None:
    """What the recipe asks to guarantee. Raises UserError for parts of a claim."""
    return claim_of(
        base=recipe.base,
        epsilon=recipe.epsilon,
        delta=recipe.delta,
        radius=recipe.radius,
        ball=recipe.ball,
        shards=recipe.shards or (),
        clip=recipe.clip,
        inherited=recipe.inherited,
    )


def check_claim(recipe: Recipe) -> Claim | None:
    """The claim, after everything was refused that would void it; before a model is read."""
    claim = claimed(recipe)
    if claim is None:
        return None
    for name, field in type(recipe).model_fields.items():
        if name not in HARMLESS and getattr(recipe, name) != field.default:
            raise UserError(
                f"--{name} takes from private data what no mechanism accounts for",
                got=f"--{name} {getattr(recipe, name)} beside a guarantee",
                fix=f"leave --{name} out, or give up the guarantee",
            )
    if isinstance(claim, Inherit) and recipe.base is not None:
        raise UserError("--base serves --radius", got="--inherited", fix="leave --base out")
    for name in RECORDS:
        path = getattr(recipe, name)
        if path and recipe.calibration and Path(path).resolve() == Path(recipe.calibration).resolve():
            raise UserError(
                "with a guarantee the calibration text must be public",
                got=f"--calibration {recipe.calibration}, which is also --{name}",
                fix="give a public text, or leave --calibration out for the text every Python carries",
            )
    if isinstance(claim, Shards):
        folders = [Path(folder).resolve() for folder in claim.folders]
        if len(set(folders)) < len(folders):
            raise UserError("a shard is given twice", got=", ".join(claim.folders), fix="give every fine-tune once")
    return claim


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a release covers: every floating-point tensor that a checkpoint holds, those that share memory once."""
    found: dict[str, Tensor] = {name: own.detach() for name, own in model.named_parameters()}
    stored, seen = model.state_dict(), {own.data_ptr() for own in found.values()}
    for name, own in model.named_buffers():
        if name in stored and own.is_floating_point() and own.data_ptr() not in seen:
            found[name] = own.detach()
    return {name: own for name, own in found.items() if own.is_floating_point()}


def foretold(claim: Claim, base: Loaded, bits: float) -> Price | None:
    """What the noise will leave of `bits` bits, from the base and the claim alone; None where there is no noise."""
    tensors = tensors_of(base.model)
    if isinstance(claim, Inherit):
        return None
    if isinstance(claim, Ball):
        sensitivity = claim.radius
    else:
        tensors = {name: tensors[name] for name in _changes(claim.folders[0], base)}
        sensitivity = OneRecord(len(claim.folders), claim.clip).sensitivity
    dimensions = sum(tensor.numel() for tensor in tensors.values())
    return price_of(tensors, sigma_for(claim.epsilon, claim.delta, sensitivity, dimensions)[0], bits)


@torch.no_grad()
def release_model(
    claim: Ball | Shards,
    base: Loaded,
    model: nn.Module | None = None,
    *,
    tokens: Int[Tensor, "n length"] | None = None,
    text: str = "",
    progress: Progress = silent,
) -> Guarantee:
    """Put the release in the base's place, tensor by tensor, in the base's types; the guarantee of what is there now.

    base: gets other tensors; what looked at the old ones still sees the base's. model: the private one, for a ball;
    fine-tunes of shards are read from their folders. tokens, text: public, for a ball in a metric. Noise is fresh on
    every call; nothing of it is kept.

    Raises UserError where private and public tensors do not fit, or no guarantee can be given. What the base holds
    after an error is still covered, but no model.
    """
    public = tensors_of(base.model)
    labelled = {name: Public(own, f"the public base {base.name}") for name, own in public.items()}
    if isinstance(claim, Ball):
        own = tensors_of(model)
        _check_same(own, public, base.name)
        norm = euclidean() if claim.shape == "euclidean" else in_metric(metric_factors(base.model, tokens, text))
        guarantee, found = releasing(
            private(own, "the private model"), labelled, WeightBall(claim.radius, norm),
            epsilon=claim.epsilon, delta=claim.delta,
        )  # fmt: skip
    else:
        shards = [_Shard(_changes(folder, base), Origin(folder)) for folder in claim.folders]
        adjacency = OneRecord(len(shards), claim.clip)
        guarantee, found = aggregating(shards, labelled, adjacency, epsilon=claim.epsilon, delta=claim.delta)
    places = dict(base.model.named_parameters()) | dict(base.model.named_buffers())
    for index, (name, released) in enumerate(found, start=1):
        places[name].data = released.values.to(places[name].device, places[name].dtype)
        progress("release", index, len(guarantee.scope.covered), name)
    return guarantee


class _Shard(Mapping[str, Change]):
    """One fine-tune's changes as private values of one origin, read from the disk each time they are asked for."""

    def __init__(self, changes: FolderChanges, origin: Origin):
        self.changes, self.origin = changes, origin

    def __getitem__(self, name: str) -> Change:
        change = self.changes[name]
        if isinstance(change, Factors):
            left, right = (Private(part, self.origin, name) for part in (change.left, change.right))
            return LowRank(left, right, change.scale)
        return Private(change, self.origin, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)


def _changes(folder: str, base: Loaded) -> FolderChanges:
    tied = getattr(base.model, "all_tied_weights_keys", None) or {}
    return folder_changes(folder, tensors_of(base.model), tied=frozenset([*tied, *tied.values()]))


def _check_apart(folders: Sequence[str], base: Loaded) -> None:
    """Raise UserError where a folder holds no change of the base, or two hold the same one: what was trained on a
    record would count twice, and one record could move the mean by more than the noise was made for.
    """
    known: dict[str, str] = {}
    for folder in folders:
        digest = _changes(folder, base).digest()
        if digest in known:
            raise UserError(
                "two shards are one fine-tune: its records would count twice, and the guarantee would not hold",
                got=f"the same weights in {known[digest]} and {folder}",
                fix="give every fine-tune once, each trained on records of its own",
            )
        known[digest] = folder


def _check_same(own: Mapping[str, Tensor], public: Mapping[str, Tensor], base: str) -> None:
    """Raise UserError unless both models have the same tensors."""
    mine, theirs = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (own, public))
    if mine != theirs:
        name = min(name for name, _ in mine.items() ^ theirs.items())
        raise UserError(
            f"the base {base} is no base of the model: {name} differs",
            got=f"{mine.get(name, 'none')} and {theirs.get(name, 'none')} in the base",
            fix="give the model that it was fine-tuned from",
        )


def _check_same_text(recipe: Recipe, base: Loaded, loaded: Loaded, texts: Texts) -> None:
    """Raise UserError where the base's tokenizer, whose files are shipped, cuts the texts in another way."""
    mine, its = (getattr(one.tokenizer, "backend_tokenizer", None) for one in (loaded, base))
    if mine is not None and its is not None and mine.to_str() == its.to_str():
        return
    other = prepare_texts(base.tokenizer, recipe)
    for one, two in ((texts.calibration, other.calibration), (texts.evaluation, other.evaluation)):
        if not torch.equal(one.tokens, two.tokens):
            raise UserError(
                "the tokenizer of the given model is not the public base's, whose files are shipped with a guarantee",
                fix="fine-tune with the base's tokenizer",
            )


def inherited(claim: Inherit, loaded: Loaded) -> Guarantee:
    """What the trainer's statement says, for all tensors of the model. Raises UserError where it lacks a part."""
    tensors = tensors_of(loaded.model)
    return inherit(Path(claim.statement), tensors, {}, list(tensors)).guarantee


def entry_of(guarantee: Guarantee, claim: Claim, base: str, text: str, price: Price | None) -> dict:
    """What report.json says of a guarantee. base, text: what was taken to be public."""
    entry = guarantee.to_dict()
    if isinstance(claim, Inherit):
        files = "Configuration, tokenizer and the other files are those of the given folder: covered only if the "
        files += "trainer's statement covers them."
    else:
        files = SIDE_FILES
    entry["not_covered"] = f"{entry['not_covered']} {NOT_SHIPPED}"
    entry["sentence"] = f"{entry['sentence']} {files} {NOT_SHIPPED}"
    return entry | {
        "files": files,
        "assumes": " ".join(_assumed(claim, base, text)),
        "again": None if isinstance(claim, Inherit) else _again(guarantee),
        "bits_left": None if price is None else price.left,
        "noise": None if price is None else price.words,
    }


def _assumed(claim: Claim, base: str, text: str) -> list[str]:
    """What whoever runs it states, and nothing here can check."""
    said = [f"The calibration text ({text}) is public.", UNSEEN]
    if isinstance(claim, Inherit):
        return [*said, "The trainer's statement is true."]
    said = [f"The base ({base}) is public.", *said]
    if isinstance(claim, Shards):
        said.append("Every record lies in one shard, which does not depend on other records.")
        said.append("Nothing in the training of one shard looked at another, or was tuned on all of them.")
    return said


def _again(guarantee: Guarantee) -> str:
    """What a second release from the same data would do to the numbers: Gaussian noise composes in squares."""
    mechanism, delta = guarantee.mechanism, guarantee.delta
    twice = epsilon_with(math.sqrt(2) * mechanism.mu, delta, mechanism.slack)
    return (
        f"This was one release. A run that goes on (--resume) uses it again; a new one draws fresh noise and adds to "
        f"it: two together are ({twice:.4g}, {delta:g})-indistinguishable, k of them {mechanism.mu:.4f} sqrt(k)-GDP."
    )


def public_base(claim: Ball | Shards, recipe: Recipe, loaded: Loaded) -> Loaded:
    """The base that a release takes the place of: read from its folder, or the model itself where shards are given."""
    if isinstance(claim, Shards):
        return loaded
    return load(recipe.base, device=recipe.device)


def announced(recipe: Recipe, loaded: Loaded, texts: Texts) -> tuple[str | None, dict | None]:
    """Before the work: what noise will cost, in words, and what the report will say of a trainer's own guarantee.

    texts: by the given model's tokenizer. Raises UserError where that is not the base's, and where the trainer's
    statement, the base or a shard is not what it should be.
    """
    claim = claimed(recipe)
    if claim is None:
        return None, None
    if isinstance(claim, Inherit):
        return None, entry_of(inherited(claim, loaded), claim, recipe.model, texts.calibration.source, None)
    base = public_base(claim, recipe, loaded)
    if isinstance(claim, Ball):
        _check_same(tensors_of(loaded.model), tensors_of(base.model), base.name)
        _check_same_text(recipe, base, loaded, texts)
    else:
        _check_apart(claim.folders, base)
    return foretold(claim, base, recipe.rate if recipe.grid == "lattice" else recipe.bits).words, None


def chosen_by(entry: dict | None, goal: dict | None) -> dict | None:
    """The guarantee of a run whose options were taken from a frontier: that was measured on the private model."""
    if entry is None or not (goal or {}).get("frontier"):
        return entry
    seen = (
        f"Settings were chosen by a frontier ({goal['frontier']}) that was measured on the private model: that choice "
        "is not covered."
    )
    more = " Every guaranteed point of that frontier was a release of the same weights, too."
    again = (
        None
        if entry["again"] is None
        else entry["again"].replace("This was one release.", "This was one release." + more)
    )
    return entry | {
        "assumes": entry["assumes"].replace(UNSEEN, seen),
        "not_covered": f"{entry['not_covered']} {seen}",
        "sentence": f"{entry['sentence']} {seen}",
        "again": again,
    }


def with_guarantee(privacy: dict | None, entry: dict | None) -> dict | None:
    """The `privacy` part of a report with the guarantee in it; attacks may not have been run."""
    if entry is None:
        return privacy
    nothing = {"n_members": 0, "n_nonmembers": 0, "attacks": [], "extraction": [], "exposure": []}
    return (privacy or nothing) | {"guarantee": entry}
