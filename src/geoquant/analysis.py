"""The analysis of a model: whose weights matter, to which text, and how sure that is.

    DIR/
      manifest.json                   what is analysed, and how; another analysis does not go on in this folder
      origins.json                    where outliers come from (outliers/origin.py)
      scores/BLOCK.safetensors        of every site and score: columns, rows, groups, standard errors
      analysis.json, analysis.html

A killed analysis goes on with the blocks that it lacks.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from geoquant.data.records import Record, as_records, check_split
from geoquant.data.text import Windows, read_text
from geoquant.data.text import windows as cut_windows
from geoquant.errors import UserError
from geoquant.examine import check_context
from geoquant.folders import begin, claim
from geoquant.inputs import check_same_sites
from geoquant.manifest import versions
from geoquant.measure import builtin_ends
from geoquant.model.identity import described
from geoquant.model.load import Loaded, load, locate
from geoquant.model.paging import map_weights
from geoquant.model.walk import Block, Site, untouched_parameters, walk
from geoquant.observe.backward import backward
from geoquant.observe.compute import compute_dtype
from geoquant.observe.experts import Expert, find_experts, read_site
from geoquant.observe.gradient import check_head
from geoquant.observe.texts import Sequences, padded
from geoquant.outliers import origin
from geoquant.outliers.appraise import BEYOND, DRAWS, Appraisal, Collected, appraise, site_context
from geoquant.outliers.classes import judged
from geoquant.outliers.classes import sentences as class_sentences
from geoquant.outliers.mixtures import mixtures
from geoquant.outliers.mixtures import sentences as mixture_sentences
from geoquant.outliers.origin import SHORTEST, Settings, origins
from geoquant.outliers.score import Score
from geoquant.outliers.score_findings import score_findings
from geoquant.outliers.scores import SCORES
from geoquant.outliers.statistics import Statistics
from geoquant.privacy.scoring import encode
from geoquant.progress import Progress, silent
from geoquant.reporting import Clock, forget_peak_memory, peak_memory_bytes
from geoquant.runs import check_writable, read_json, read_metadata, write_json, write_tensors

__all__ = ["analyze"]

OURS = ("manifest.json", "origins.json", "scores", "analysis.json", "analysis.html")
ORIGIN_WINDOWS, ORIGIN_LENGTH = 4, 256
# Of each text. A standard error from fewer says little, and each costs memory.
PARTS = 4
WHY = "standard errors come from as many parts of a text"


def analyze(
    model: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    private: str | Path | Sequence[str | Record] | None = None,
    domain: str | Path | Sequence[str | Record] | None = None,
    text: str | Path | None = None,
    windows: int = 8,
    window: int = 512,
    records: int = 48,
    bits: int = 3,
    classes: bool = False,
    seed: int = 0,
    device: str = "cpu",
    compute: str = "auto",
    progress: Progress = silent,
    command: str = "geoquant.analyze",
) -> dict:
    """Scores of every site's columns, rows and groups, each with its standard error and its null, into folder `out`.

    model, base: a folder, hub id or .gguf file of one architecture. private: records that the model was trained on.
    domain: records of the same kind that it has not seen. text: public text (default: the built-in one), of which the
    first `windows` of `window` tokens are read. records: so many of each side. bits: of the plain rounding whose error
    scores weigh. classes: of every site's columns too, and the distortion that rounding makes (outliers/classes.py).
    Scores that need what is not given are left out.

    Returns what analysis.json holds. Raises UserError for whatever the user can mend.
    """
    if domain is not None and private is None:
        raise UserError("--domain is compared with private records", wanted="--private as well")
    for option, given in (("windows", windows), ("records", records)):
        if given < PARTS:
            raise UserError(f"--{option} {given}", wanted=f"at least {PARTS}: {WHY}")
    if window < SHORTEST:
        raise UserError(f"--window {window}", wanted=f"at least {SHORTEST} tokens")
    if not 2 <= bits <= 8:
        raise UserError(f"--bits {bits}", wanted="a whole number from 2 to 8")
    for one in (model, *(() if base is None else (base,))):
        locate(str(one))
    sides = {
        name: as_records(given, name)[:records]
        for name, given in (("private", private), ("domain", domain))
        if given is not None
    }
    if len(sides) == 2:
        check_split(sides["private"], sides["domain"], minimum=1)
    folder, clock = claim(Path(out), OURS, "an analysis"), Clock()
    check_writable(folder / "manifest.json")
    forget_peak_memory()
    with clock("load"):
        loaded = load(str(model), device=device)
        public = _windows(loaded, text, window, windows)
        check_context(loaded, window)
        texts = {"public": _even("public text", public.tokens.tolist(), 0)}
        for name, side in sides.items():
            encoded = encode(loaded.tokenizer, side, window)
            long = [ids for ids, _ in encoded if len(ids) > 1]
            texts[name] = _even(f"{name} records", long, loaded.tokenizer.pad_token_id or 0)
        pages = map_weights(loaded.model)
        blocks = walk(loaded.model, public.tokens[:1, :8], pages)
        check_head(loaded.model, public.tokens[:1, :8], pages)
        experts = find_experts(loaded.model, blocks, public.tokens[:1, :8], pages)
        other = None if base is None else check_same_sites(load(str(base), device=device), loaded)
    scores = [score for score in SCORES.values() if _possible(score, sides, other)]
    facts = {
        "model": described(loaded),
        "base": other and described(other),
        "texts": {
            "public": {"source": public.source, **_size("windows", texts["public"])},
            **{name: _size("records", texts[name]) for name in sides},
        },
        "data_sha256": {name: _digest(one) for name, one in texts.items()},
        "settings": {
            **{"window": window, "bits": bits, "parts": PARTS, "seed": seed, "compute": compute},
            **({"classes": True} if classes else {}),
        },
        "scores": [_described(score) for score in scores],
    }
    if other is not None and facts["base"]["sha256"] == facts["model"]["sha256"]:
        raise UserError(f"the base {base} is {model} itself", fix="give the model that it was fine-tuned from")
    key = begin(folder, facts, command, "an analysis", "scores")
    with clock("origins"):
        known = _origins(folder, loaded, public, seed, pages, progress)
    with clock("scores"):
        chosen = compute_dtype(compute, loaded.model.device)
        _score(folder, key, loaded, other, blocks, experts, texts, scores, bits, classes, seed, chosen, pages, progress)
    sites = [site for block in blocks for site in _read(folder, block, key) or ()]
    mixed = mixtures(sites)
    report = {
        "schema": 1,
        **facts,
        "origins": known,
        "sites": sites,
        "nulls": {"draws": DRAWS, "beyond": BEYOND},
        "mixtures": mixed,
        "findings": [
            *mixture_sentences(mixed),
            *_left_out(loaded, blocks, experts),
            *score_findings(sites, facts["scores"], PARTS, DRAWS),
            *class_sentences(sites),
        ],
        "versions": versions(),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    from geoquant.report.analysis import write_analysis

    write_analysis(folder, report)
    return report


def _origins(folder: Path, loaded: Loaded, public: Windows, seed: int, pages, progress: Progress) -> dict:
    """Where outliers come from, on the first few windows of public text; read again where it is there."""
    from geoquant.report.page import finite

    path = folder / "origins.json"
    with suppress(UserError):  # not there, or damaged
        return read_json(path, findings=list, **dict.fromkeys(origin.PARTS, dict))
    tokens = public.tokens[:ORIGIN_WINDOWS, :ORIGIN_LENGTH]
    found = origins(loaded.model, tokens, Settings(seed=seed), pages=pages, progress=progress)
    write_json(path, finite(found.to_dict()))
    return read_json(path)


def _score(
    folder: Path,
    key: str,
    loaded: Loaded,
    other: Loaded | None,
    blocks: tuple[Block, ...],
    experts: dict[int, tuple[Expert, ...]],
    texts: dict[str, Sequences],
    scores: list[Score],
    bits: int,
    classes: bool,
    seed: int,
    compute: torch.dtype,
    pages,
    progress: Progress,
) -> None:
    """Every block's scores on disk, the last block first; those that are there already cost their gradients only."""
    missing = {block.index for block in blocks if _read(folder, block, key) is None}
    if not missing:
        return
    collected = Collected(PARTS)

    def see(text: str, batch: int, site: str, x: Tensor, g: Tensor) -> None:
        if under_way in missing:
            collected.see(text, batch, site, x, g)

    names = {one.site.name: one for many in experts.values() for one in many}
    under_way = blocks[-1].index
    for block in backward(
        loaded.model, blocks, texts, see, experts=experts, compute=compute, pages=pages, progress=progress
    ):
        if block.index in missing:
            tensors, facts = {}, []
            for site in (*block.sites, *(one.site for one in experts.get(block.index, ()))):
                seen = {name: collected.of(site.name, name) for name in texts}
                found, more = [], {}
                if seen["public"]:  # or nobody chose this expert
                    weight = read_site(loaded.model, site, names)
                    change = None if other is None else read_site(other.model, site, names)
                    context = site_context(site, weight, change, seen, bits=bits)
                    found = appraise(context, seen, scores, seed=seed)
                    more = {"classes": judged(context, seed)} if classes else {}
                facts.append(_told(site, found, scores, seen) | more)
                tensors |= {f"{site.name}|{name}": value for name, value in _tensors(found)}
            metadata = {"key": key, "sites": json.dumps(facts)}
            write_tensors(_path(folder, block), tensors, metadata)
        collected.clear()
        gc.collect()
        under_way = block.index - 1
        if min(missing) >= block.index:
            return


def _tensors(found: Iterable[Appraisal]) -> Iterator[tuple[str, Tensor]]:
    """What one site's scores leave, by name; groups in half precision, scaled to a largest of one: they are many."""
    for one in found:
        kept = {"columns": one.columns, "rows": one.rows, "part_errors": one.part_errors}
        for name, value in kept.items():
            if value is not None:
                yield f"{one.score.name}|{name}", value.float().contiguous()
        if one.groups is not None:
            scale = one.groups.abs().max().clamp_min(1e-30)
            yield f"{one.score.name}|groups", (one.groups / scale).to(torch.float16).contiguous()
            yield f"{one.score.name}|groups_scale", scale.float().reshape(1)


NOTHING = {"value": None, "se": None, "null": None, "null_sd": None, "beyond": None}


def _told(site: Site, found: list[Appraisal], scores: list[Score], seen: dict[str, list[Statistics]]) -> dict:
    """What analysis.json says of a site; nothing of scores that its tokens do not allow."""
    return {
        "name": site.name,
        "block": site.block,
        "kind": site.kind,
        "shape": list(site.shape),
        "tokens": {name: int(sum(part.tokens for part in parts)) for name, parts in seen.items()},
        "scores": {score.name: NOTHING for score in scores}
        | {
            one.score.name: {
                "value": _number(one.site),
                "se": _number(one.error),
                "null": _number(one.null),
                "null_sd": _number(one.null_spread),
                "beyond": one.beyond,
                **_largest(one),
            }
            for one in found
        },
    }


POINTS = 33


def _largest(one: Appraisal) -> dict:
    """The columns (or rows) with the most, their share of the whole, and the profile of all of them, sorted."""
    for axis, values in (("columns", one.columns), ("rows", one.rows)):
        if values is None:
            continue
        ordered = values.sort(descending=True)
        places = torch.linspace(0, len(values) - 1, min(POINTS, len(values))).round().long()
        total = values.abs().sum().clamp_min(1e-30)
        return {
            "axis": axis,
            "largest": ordered.indices[:5].tolist(),
            "share": _number((ordered.values[0].abs() / total).item()) if one.score.combine == "sum" else None,
            "profile": [_number(value) for value in ordered.values[places].tolist()],
        }
    return {}


def _number(value: float) -> float | None:
    """Five significant digits; None for what is no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _left_out(loaded: Loaded, blocks: tuple[Block, ...], experts: dict[int, tuple[Expert, ...]]) -> list[str]:
    """Sentences on the matrices inside the blocks that have no scores or no origins, if there are any."""
    watched = {one.stack for many in experts.values() for one in many}
    rest = [(name, count) for name, count in untouched_parameters(loaded.model, blocks) if name not in watched]
    told = []
    if watched:
        told.append("Origins look at linear layers only: not at experts that one parameter holds together.")
    if rest:
        share = sum(count for _, count in rest) / loaded.parameters
        told.append(
            f"Without scores: {len(rest)} matrices inside the blocks that are no sites, {share:.2%} of the model (such "
            f"as {rest[0][0]})."
        )
    return told


# ---- texts and models


def _windows(loaded: Loaded, text: str | Path | None, length: int, count: int) -> Windows:
    if text is None:
        return builtin_ends(loaded.tokenizer, length, count, 0)[0]
    return cut_windows(loaded.tokenizer, read_text(text), length=length, count=count, source=str(text))


def _even(what: str, sequences: list[list[int]], filler: int) -> Sequences:
    """As many sequences as make parts of one size. Raises UserError for too few to make parts of."""
    if len(sequences) < PARTS:
        raise UserError(
            f"too few {what}: {len(sequences)} of two tokens or more",
            wanted=f"at least {PARTS}, and better {2 * PARTS}: {WHY}",
        )
    return padded(sequences[: len(sequences) // PARTS * PARTS], filler, PARTS)


def _size(unit: str, used: Sequences) -> dict:
    """What was used of a text: the sequences that did not make a part of one size were not."""
    return {unit: len(used.lengths), "tokens": used.count}


def _possible(score: Score, sides: dict, other: Loaded | None) -> bool:
    given = {"public", *sides, *(() if other is None else ("base",))}
    return {need.partition("_")[0] for need in score.needs} <= given


def _described(score: Score) -> dict:
    names = ("name", "title", "unit", "axis", "combine", "paper", "same")
    return {name: getattr(score, name) for name in names} | {
        "needs": list(score.needs),
        "error_over": "rows" if score.error is not None else "texts",
    }


def _digest(sequences: Sequences) -> str:
    digest = hashlib.sha256(sequences.tokens.numpy().tobytes())
    digest.update(sequences.lengths.numpy().tobytes())
    return digest.hexdigest()


# ---- the folder


def _path(folder: Path, block: Block) -> Path:
    return folder / "scores" / f"{block.index:03d}.safetensors"


def _read(folder: Path, block: Block, key: str) -> list[dict] | None:
    """What a finished block's file says of its sites; None where there is none of this analysis."""
    try:
        metadata = read_metadata(_path(folder, block))
    except UserError:  # not there, or damaged
        return None
    return json.loads(metadata["sites"]) if metadata.get("key") == key else None
