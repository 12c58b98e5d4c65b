"""Do classes of weights answer to noise in ways of their own: in what the model can do, and in what it gives away?

    python benchmarks/response.py TUNED --base MODEL --private IN.jsonl --domain OUT.jsonl --text TEXT.txt --out DIR

Single columns of every site are classed by their geometry (`outliers.fsgd`: spike, island, core, bulk), and beside
these stand classes by score, the same share of each site's columns:

    memory    the largest change from the base times private less public Fisher (`privacy_excess`)
    costly    the largest token-weighted output error of 3-bit rounding (`hop_self_weighted`)
    columns   at random
    null      as many single weights of the same sites as in `columns`, at random

Each is disturbed by noise of one common length (`outliers.prm`), the same draws at every rho. Measured are the loss on
public text and two attacks on the same records: by loss, and by loss against the base's. Classes are made on the first
windows of the text and measured on others; members are the records that `memory` is made of, as their owner would.

Printed: the classes; responses in units and in standard errors; and for every pair of classes the Mahalanobis distance
of their trajectories with its permutation p and Holm's over the pairs, jointly and by each coordinate alone: a pair
that is apart jointly and in the loss may not be in the attack. The gap between members' and others' losses stands
beside the attacks, whose AUC may be 1 whatever is done. DIR holds one line per response (a killed run goes on), the
table as JSON, and densities of the trajectories as SVG.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoquant.data.records import Record, as_records
from geoquant.data.text import Windows, read_text, windows
from geoquant.geometry.density import Density, density
from geoquant.lines import read_lines
from geoquant.model.load import Loaded, load
from geoquant.model.walk import Block, read_weight, site_modules, walk
from geoquant.observe.backward import backward
from geoquant.observe.texts import padded
from geoquant.outliers.appraise import Collected
from geoquant.outliers.context import SiteContext
from geoquant.outliers.effects import Baseline, Effect, Material, compare, effect_of, open_baseline
from geoquant.outliers.fsgd import CLASSES, fsgd
from geoquant.outliers.interventions import rounded
from geoquant.outliers.prm import Pair, Response, Trajectories, common_length, gathered, noise, null_class, separation
from geoquant.outliers.scores.hop import hop_self
from geoquant.outliers.scores.privacy import privacy_excess
from geoquant.privacy.scoring import encode, score_records

SHARE = 0.01  # of a site's columns, for classes by score
BITS = 3
SCORED, RANDOM, NULL = ("memory", "costly"), "columns", "null"
AGAINST = ("reference", "loss", "gap")
TWO_SIDED = 1.959964

Places = dict[str, dict[str, Tensor]]  # class, site: columns
Masks = dict[str, dict[str, Tensor]]  # class, site: which weights


def classes(loaded: Loaded, base: Loaded, text: Windows, private: tuple[Record, ...], seed: int) -> Places:
    """Columns of every class at every site; a class has no entry where it has no column."""
    model = loaded.model
    records = sorted((ids for ids, _ in encode(loaded.tokenizer, private, text.tokens.shape[1])), key=len)
    texts = {
        "public": padded(text.tokens.tolist(), 0),
        "private": padded(records[len(records) % 2 :], loaded.tokenizer.pad_token_id or 0),
    }
    blocks = walk(model, text.tokens[:1, :8])
    own, other = site_modules(model), site_modules(base.model)
    found: Places = {name: {} for name in (*CLASSES, *SCORED, RANDOM)}
    collected = Collected(1)
    for block in backward(model, blocks, texts, collected.see):
        for site, places in _of_block(block, own, other, collected, seed):
            for name, columns in places.items():
                if len(columns):
                    found[name][site] = columns
        collected.clear()
    return found


def _of_block(
    block: Block, own: dict, other: dict, collected: Collected, seed: int
) -> Iterable[tuple[str, dict[str, Tensor]]]:
    for site in block.sites:
        weight = read_weight(own[site.name])
        (public,), (private,) = (collected.of(site.name, text) for text in ("public", "private"))
        context = SiteContext(
            site.name,
            site.kind,
            weight,
            rounded(weight, BITS) - weight,
            public,
            private=private,
            base=read_weight(other[site.name]),
        )
        generator = _generator(seed, site.name)
        labels = fsgd(context, generator, size=1, nulls=0).labels
        places = {name: (labels == index).nonzero()[:, 0] for index, name in enumerate(CLASSES)}
        for name, score in zip(SCORED, (privacy_excess(context), hop_self(context, "weighted")), strict=True):
            places[name] = _top(score.sum(0))
        places[RANDOM] = _top(torch.rand(weight.shape[1], generator=generator))
        yield site.name, places


def _top(score: Tensor) -> Tensor:
    return score.topk(max(1, round(SHARE * len(score)))).indices.sort().values


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big"))


def masks(places: Places, weights: Mapping[str, Tensor], seed: int) -> Masks:
    """Which weights are of each class, and the null class; classes without any are left out."""
    found = {}
    for name, sites in places.items():
        if sites:
            found[name] = {site: _columns(columns, weights[site]) for site, columns in sites.items()}
    return found | {NULL: null_class(found[RANDOM], _generator(seed, NULL))}


def _columns(columns: Tensor, weight: Tensor) -> Tensor:
    inside = torch.zeros(weight.shape[1], dtype=torch.bool)
    inside[columns] = True
    return inside.expand(weight.shape)


def respond(
    baseline: Baseline,
    weights: Mapping[str, Tensor],
    members: Masks,
    lengths: Mapping[float, float],
    seeds: int,
    seed: int,
    path: Path,
) -> list[dict]:
    """One response per seed, class and rho, those in the file not measured again. lengths: of the noise at each rho."""
    names, rhos, lines = tuple(members), tuple(lengths), read_lines(path)
    known = {(line["class"], line["seed"], line["rho"]) for line in lines}
    begun = time.time()
    for draw in range(seeds):
        for index, name in enumerate(names):
            if all((name, draw, rho) in known for rho in rhos):
                continue
            generator = torch.Generator().manual_seed(seed + draw * len(names) + index)
            drawn = noise(weights, members[name], 1.0, generator)
            for rho, length in lengths.items():
                if (name, draw, rho) in known:
                    continue
                noisy = ((site, weights[site] + length * part) for site, part in drawn.items())
                found = effect_of(baseline, noisy, name, f"noise@{rho}")
                lines.append({"class": name, "seed": draw, "rho": rho, **told(found)})
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
            print(f"{len(lines)} of {seeds * len(names) * len(rhos)}, {time.time() - begun:.0f} s", flush=True)
    return lines


def told(found: Effect) -> dict:
    """Changes with their standard errors. Raises ValueError where the model became one that gives no probabilities."""
    if not math.isfinite(found.public.value):
        raise ValueError(f"{found.intervention} on {found.part} breaks the model: take smaller rhos")
    line = {"nll": [found.public.value, found.public.se], "gap": [found.gap.value, found.gap.se]}
    for name, one in found.attacks.items():
        low, high = one.difference.ci
        line[name] = [one.difference.value, (high - low) / 2 / TWO_SIDED]
    return line | {"auc": {name: one.auc[1] for name, one in found.attacks.items()}, "seconds": found.seconds}


def trajectories(lines: list[dict], lengths: Mapping[float, float], against: str) -> Trajectories:
    """Of complete seeds; `against`: which attack's change stands beside that of the loss."""
    whole = max(line["seed"] for line in lines) + 1
    full = len({line["class"] for line in lines}) * len({line["rho"] for line in lines})
    while sum(line["seed"] == whole - 1 for line in lines) < full:
        whole -= 1
    responses = {
        (line["class"], line["seed"], line["rho"]): Response(*line["nll"], *line[against])
        for line in sorted(lines, key=lambda line: (line["seed"], line["rho"]))
        if line["seed"] < whole
    }
    return gathered(responses, tuple(lengths.values()))


def separations(of: Trajectories, permutations: int) -> dict[str, dict[tuple[str, str], Pair]]:
    """Of both coordinates together, and of each alone."""
    parts = {"both": slice(0, 2), "loss of public text": slice(0, 1), "attack": slice(1, 2)}
    return {
        name: separation(replace(of, points=of.points[..., part]), permutations=permutations)
        for name, part in parts.items()
    }


# ---- what is printed


def with_error(values: np.ndarray, digits: int) -> str:
    return f"{values.mean():+.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


def print_classes(members: Masks, weights: Mapping[str, Tensor], rho: float, length: float) -> None:
    """Size of each class, noise per weight, and shared columns."""
    sizes = {site: weight.square().mean().item() for site, weight in weights.items()}
    whole = sum(weight.numel() for weight in weights.values())
    names = [name for name in members if name != NULL]
    columns = {
        name: {(site, int(c)) for site, mask in members[name].items() for c in mask[0].nonzero()[:, 0]}
        for name in names
    }
    print(f"| class | share of weights | sites | noise per RMS at rho {rho:g} |", *(f"also {n} |" for n in names))
    print("|---" * (4 + len(names)) + "|")
    for name, sites in members.items():
        count = sum(int(mask.sum()) for mask in sites.values())
        energy = sum(sizes[site] * int(mask.sum()) for site, mask in sites.items())
        shared = [
            f"{len(columns[name] & columns[o]) / len(columns[name]):.2f} |" if name != NULL else "|" for o in names
        ]
        print(f"| {name} | {count / whole:.4f} | {len(sites)} | {length / energy**0.5:.3f} |", *shared)


def print_responses(lines: list[dict], of: Trajectories, against: str) -> None:
    seeds = of.points.shape[1]
    print(f"\n| class | rho | dNLL | dNLL/SE | d{against} | d{against}/SE | (means of {seeds} seeds ± SE)")
    print("|---" * 6 + "|")
    for index, name in enumerate(of.classes):
        for place, rho in enumerate(of.rhos):
            own = [line for line in lines if line["class"] == name and line["rho"] == rho and line["seed"] < seeds]
            units = [np.array([line[key][0] for line in own]) for key in ("nll", against)]
            points = of.points[index, :, place]
            cells = [with_error(units[0], 4), with_error(points[:, 0], 2), with_error(units[1], 4)]
            print(f"| {name} | {rho:g} |", " | ".join([*cells, with_error(points[:, 1], 2)]), "|")


def print_pairs(found: dict[str, dict[tuple[str, str], Pair]]) -> None:
    print("\n| pair |", *(f"{name}: distance | p | Holm |" for name in found))
    print("|---" * (1 + 3 * len(found)) + "|")
    for pair in next(iter(found.values())):
        cells = (f"{one[pair].distance:.2f} | {one[pair].p:.4f} | {one[pair].p_holm:.3f} |" for one in found.values())
        print(f"| {pair[0]}, {pair[1]} |", *cells)
    for name, pairs in found.items():
        apart = sum(pair.p_holm < 0.05 for pair in pairs.values())
        print(f"{name}: {apart} of {len(pairs)} pairs apart at 0.05 after Holm")


PANEL, MARGIN, CELLS = 180, 34, 40


def picture(of: Trajectories, against: str) -> str:
    """One panel per class: density of its responses at all rhos (in asinh of SE), its points, its modes as crosses."""
    count, flat = len(of.classes), np.arcsinh(of.points.reshape(len(of.classes), -1, 2))
    low, high = flat.min((0, 1)), flat.max((0, 1))
    # Densities reach beyond the outermost points, and several classes share one pair of axes.
    low, high = low - 0.1 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9
    columns = 4
    width, height = columns * (PANEL + MARGIN), -(-count // columns) * (PANEL + MARGIN)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    for index, name in enumerate(of.classes):
        left, top = index % columns * (PANEL + MARGIN) + MARGIN / 2, index // columns * (PANEL + MARGIN) + MARGIN / 2
        parts.append(f'<g transform="translate({left:g} {top:g})">')
        parts.append(f'<rect width="{PANEL}" height="{PANEL}" fill="none" stroke="#999"/>')
        found = density(flat[index], CELLS)
        if found is not None:
            parts += _shades(found, low, high)
        for x, y in _screen(flat[index], low, high):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#124"/>')
        for x, y in _screen(found.modes, low, high) if found is not None else ():
            parts.append(f'<path d="M{x - 4:.1f} {y:.1f}h8M{x:.1f} {y - 4:.1f}v8" stroke="#c30" stroke-width="1.5"/>')
        modes = "no plane" if found is None else f"{len(found.modes)} modes"
        parts.append(f'<text y="-4" font-size="11">{name} ({modes})</text></g>')
    parts.append(
        f'<text x="{MARGIN / 2}" y="{height - 3}" font-size="9">to the right: asinh of the change of loss in SE, '
        f"{low[0]:.1f} to {high[0]:.1f}; up: of the change of {against}, {low[1]:.1f} to {high[1]:.1f}</text></svg>"
    )
    return "\n".join(parts)


def _screen(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    x, y = ((points - low) / (high - low) * PANEL).T
    return np.stack([x, PANEL - y], axis=1)


def _shades(found: Density, low: np.ndarray, high: np.ndarray) -> list[str]:
    """The density as squares within the panel, darker where it is higher."""
    x, y = (np.linspace(low[axis], high[axis], CELLS, endpoint=False) for axis in (0, 1))
    places = np.searchsorted(found.x, x).clip(0, CELLS - 1), np.searchsorted(found.y, y).clip(0, CELLS - 1)
    inside = [(v >= axis[0]) & (v <= axis[-1]) for v, axis in ((x, found.x), (y, found.y))]
    shown = found.values[np.ix_(*places)] * np.outer(*inside) / found.heights[0]
    step = PANEL / CELLS
    return [
        f'<rect x="{i * step:.1f}" y="{PANEL - (j + 1) * step:.1f}" width="{step:.1f}" height="{step:.1f}" '
        f'fill="#48a" opacity="{shown[i, j]:.2f}"/>'
        for i, j in zip(*(shown > 0.02).nonzero(), strict=True)
    ]


# ---- the whole


def run(args: argparse.Namespace) -> None:
    """Class, disturb, measure, print."""
    args.out.mkdir(parents=True, exist_ok=True)
    private, domain = (as_records(str(one), "records")[: args.records] for one in (args.private, args.domain))
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out", "seeds", "permutations")}
    kept = args.out / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"{args.out} holds responses of other settings: {kept.read_text()}")
    kept.write_text(json.dumps(settings))
    begun = time.time()
    other = load(args.base, dtype=torch.float32)
    reference = tuple(score_records(other.model, other.tokenizer, side) for side in (private, domain))
    loaded = load(args.model, dtype=torch.float32)
    body = read_text(args.text)
    for_classes = windows(loaded.tokenizer, body, length=args.class_window, count=args.class_windows)
    used = -(-args.class_window * args.class_windows // args.window)
    both = windows(loaded.tokenizer, body, length=args.window, count=used + args.windows)
    measured = replace(both, tokens=both.tokens[used:])
    path = args.out / "classes.safetensors"
    if not path.exists():
        found = classes(loaded, other, for_classes, private, args.seed)
        save_file(
            {f"{name}|{site}": c.contiguous() for name, sites in found.items() for site, c in sites.items()}, path
        )
    places: Places = {name: {} for name in (*CLASSES, *SCORED, RANDOM)}
    for key, columns in load_file(path).items():
        name, _, site = key.partition("|")
        places[name][site] = columns
    del other
    weights = {site: read_weight(module) for site, module in site_modules(loaded.model).items()}
    members = masks(places, weights, args.seed)
    members = {name: mask for name, mask in members.items() if name in args.classes}
    unit = common_length(weights, members, 1.0)
    print(f"classes and base: {time.time() - begun:.0f} s")
    print_classes(members, weights, args.rhos[-1], args.rhos[-1] * unit)
    material = Material(measured, members=private, nonmembers=domain, reference=reference)
    baseline = open_baseline(loaded.model, loaded.tokenizer, material, memory=0)
    lengths = {rho: rho * unit for rho in args.rhos}
    lines = respond(baseline, weights, members, lengths, args.seeds, args.seed, args.out / "responses.jsonl")
    show(baseline, lines, lengths, args)


def show(baseline: Baseline, lines: list[dict], lengths: Mapping[float, float], args: argparse.Namespace) -> None:
    """Everything that is printed of responses, and the files beside them."""
    same = compare(baseline.measured, baseline.measured, baseline.material)
    aucs = ", ".join(f"{name} {one.auc[0]:.3f}" for name, one in same.attacks.items())
    print(f"\nundisturbed: NLL {same.public.before:.4f}, AUC {aucs}, gap {same.gap.before:.3f} nats")
    report = {}
    for against in AGAINST:
        of = trajectories(lines, lengths, against)
        print(f"\n## {against}")
        print_responses(lines, of, against)
        found = separations(of, args.permutations)
        print_pairs(found)
        report[against] = {
            name: {" ".join(pair): vars(one) for pair, one in pairs.items()} for name, pairs in found.items()
        }
        (args.out / f"{against}.svg").write_text(picture(of, against), encoding="utf-8")
    (args.out / "pairs.json").write_text(json.dumps(report, indent=1))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model")
    for name in ("base", "private", "domain", "text"):
        found.add_argument(f"--{name}", required=True)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--rhos", type=float, nargs="+", default=[1.0, 3.0])
    found.add_argument("--classes", nargs="+", default=[*CLASSES, *SCORED, RANDOM, NULL])
    found.add_argument("--seeds", type=int, default=8)
    found.add_argument("--windows", type=int, default=8)
    found.add_argument("--window", type=int, default=128)
    found.add_argument("--class-windows", type=int, default=4)
    found.add_argument("--class-window", type=int, default=512)
    found.add_argument("--records", type=int, default=24)
    found.add_argument("--permutations", type=int, default=4999)
    found.add_argument("--seed", type=int, default=0)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(parser().parse_args())
