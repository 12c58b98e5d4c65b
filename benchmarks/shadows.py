"""What do shadow models add to an attack, and how many are worth training?

    python benchmarks/shadows.py model MODEL --out FOLDER [--records 100] [--shadows 8] [--epochs 2] [--lora RANK]
    python benchmarks/shadows.py toy [--draws 12]
    python benchmarks/shadows.py null [--draws 200]

`model` fine-tunes the public base MODEL on made records, trains shadows on halves of members and non-members with the
same recipe, and prints every attack on the fine-tune; then the same with fewer shadows, and with each shadow in turn
as the target of the others. There a record is measured by as many models that saw it as did not, whatever the target
saw. What was trained stays in FOLDER. `toy` compares the likelihood ratios where the best possible AUC is known,
without a model. `null` counts what the attacks and their combination find where there is nothing.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import norm

from geoquant.data.private import make_records
from geoquant.data.records import Split
from geoquant.model.load import load
from geoquant.privacy.attacks import lira, membership_scores, rmia
from geoquant.privacy.attacks.combined import combine, widened
from geoquant.privacy.attacks.pool import apart, pooled, pooled_shadows
from geoquant.privacy.delong import delong_interval
from geoquant.privacy.evidence import Evidence, ShadowScores, gather
from geoquant.privacy.finetune import finetune
from geoquant.privacy.scores import RecordScores, SplitScores, load_scores, save_scores
from geoquant.privacy.scoring import score_records
from geoquant.privacy.shadows import ShadowSettings, train_shadows
from geoquant.privacy.statistics import auc, chance_p, tpr_at_fpr


def told(phase: str, done: int, total: int, note: str = "") -> None:
    if phase == "shadows" and not note:
        print(f"[{time.process_time():.0f} CPU s] {done} of {total} shadows", flush=True)


# ---- a real model


def measure(model: str, out: Path, records: int, shadows: int, settings: ShadowSettings) -> None:
    """Train, score, attack, print."""
    pool = make_records(2 * records, settings.seed + 11)
    order = np.random.default_rng(settings.seed).permutation(len(pool))
    split = Split(tuple(pool[i] for i in order[:records]), tuple(pool[i] for i in order[records:]))
    base = partial(load, model)
    reference, target = scored(base, split, settings, out)
    trained = train_shadows(base, split, shadows, settings, out, progress=told)
    print("\n| attack on the fine-tune | AUC | 95% (DeLong) | p | TPR at 10% FPR |\n|---|---|---|---|---|")
    sides = (
        gather(split.members, target.members, reference.members, shadows=trained.members),
        gather(split.nonmembers, target.nonmembers, reference.nonmembers, shadows=trained.nonmembers),
    )
    found = membership_scores(*sides)
    for name, scores in found.items():
        line(name, scores, delong_interval(*scores), chance_p(*scores))
    for name, scores in variants(*sides).items():
        line(f"{name} (not in the audit)", scores, delong_interval(*scores), chance_p(*scores))
    without = {name: scores for name, scores in found.items() if name not in ("lira", "rmia")}
    for name, chosen in (("combined, no shadows", without), ("combined", found)):
        if combination := combine(chosen):
            value = auc(*combination.scores)
            interval = widened(delong_interval(*combination.scores), value)
            line(f"{name} (interval widened)", combination.scores, interval, combination.p)
    own = ", ".join(f"{m.auc:.2f}" for m in trained.models)
    print(f"\nshadows on their own halves, against the other shadows: {own}")
    print(*trained.warnings, sep="\n")
    shadow, inside = (
        np.concatenate([getattr(side, name) for side in (trained.members, trained.nonmembers)], axis=1)
        for name in ("mean_log_prob", "inside")
    )
    fewer(pooled(*sides), shadow, inside, records)
    rotate(shadow, inside, np.concatenate([means(reference.members), means(reference.nonmembers)]))


def scored(base, split: Split, settings: ShadowSettings, out: Path) -> tuple[SplitScores, SplitScores]:
    """Both sides under the base, and under its fine-tune on the members."""
    files = out / f"base-{settings.seed}.safetensors", out / f"target-{settings.seed}-{settings.epochs}.safetensors"
    if not all(file.exists() for file in files):
        loaded = base()

        def both() -> SplitScores:
            sides = split.members, split.nonmembers
            return SplitScores(*(score_records(loaded.model, loaded.tokenizer, side) for side in sides))

        save_scores(files[0], both(), split)
        loaded.model.requires_grad_(True)
        finetune(
            loaded.model,
            loaded.tokenizer,
            split.members,
            epochs=settings.epochs,
            lr=settings.learning_rate,
            batch=settings.batch,
            seed=settings.seed + 1000,
            lora=settings.lora,
        )
        save_scores(files[1], both(), split)
        print(f"[{time.process_time():.0f} CPU s] target trained", flush=True)
    return tuple(load_scores(file, split) for file in files)


def line(name: str, scores, interval: tuple[float, float], p: float) -> None:
    caught, (low, high) = tpr_at_fpr(*scores, 0.1)
    print(
        f"| {name} | {auc(*scores):.3f} | {interval[0]:.3f} – {interval[1]:.3f} | {p:.2g} "
        f"| {caught:.2f} ({low:.2f} – {high:.2f}) |"
    )


def ratios(target: np.ndarray, shadow: np.ndarray, inside: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of all records under the attacks that need shadow models, and their variants."""
    odds, shadow_odds = lira.logit(target), lira.logit(shadow)
    return {
        "LiRA offline": lira.offline(odds, shadow_odds, inside),
        "LiRA online, as in the paper": lira.online(odds, shadow_odds, inside, spread=np.inf),
        "LiRA": lira.online(odds, shadow_odds, inside),
        "LiRA on log p": lira.online(target, shadow, inside),
        "RMIA offline": rmia.log_ratio(target, shadow, outside=~inside),
        "RMIA": rmia.log_ratio(target, shadow),
    }


def variants(members: Evidence, nonmembers: Evidence) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The forms of LiRA and RMIA that the audit does not run."""
    shadows = pooled_shadows(members, nonmembers)
    found = ratios(pooled(members, nonmembers), shadows.mean_log_prob, shadows.inside)
    return {name: apart(values, members) for name, values in found.items() if name not in ("LiRA", "RMIA")}


def fewer(target: np.ndarray, shadow: np.ndarray, inside: np.ndarray, count: int, draws: int = 20) -> None:
    """The fine-tune attacked with some of the shadows: for each record others, as many that saw it as did not."""
    print(f"\n| shadows, drawn {draws} times for each record |", end="")
    header = None
    for models in range(2, len(shadow) + 1, 2):
        rows = []
        for number in range(draws):
            found = ratios(target, *drawn_models(shadow, inside, models // 2, np.random.default_rng([models, number])))
            rows.append({name: auc(values[:count], values[count:]) for name, values in found.items()})
        if header is None:
            header = list(rows[0])
            print(" " + " | ".join(header) + " |\n" + "|---" * (len(header) + 1) + "|")
        print(f"| {models} | " + " | ".join(f"{np.mean([r[name] for r in rows]):.3f}" for name in header) + " |")


def drawn_models(shadow: np.ndarray, inside: np.ndarray, half: int, rng: np.random.Generator):
    """Scores under `half` models that saw a record and as many that did not, drawn for each record, and the mask."""
    place = rng.random(inside.shape)
    chosen = [np.where(mask, place, 2.0).argsort(axis=0)[:half] for mask in (inside, ~inside)]
    return tuple(np.take_along_axis(values, np.concatenate(chosen), axis=0) for values in (shadow, inside))


def rotate(shadow: np.ndarray, inside: np.ndarray, start: np.ndarray) -> None:
    """Each shadow as the target, all others but one as its shadows. start: scores under the base."""
    rows, half = [], len(shadow) // 2 - 1
    for number in range(len(shadow)):
        target, member = shadow[number], inside[number]
        others = np.arange(len(shadow)) != number
        few = drawn_models(shadow[others], inside[others], half, np.random.default_rng(number))
        scores = {"loss": target, "reference": target - start} | ratios(target, *few)
        rows.append({name: auc(values[member], values[~member]) for name, values in scores.items()})
    print(f"\n| each shadow as the target, {2 * half} others | mean AUC | and less that of `loss` |\n|---|---|---|")
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        gain = values - np.array([row["loss"] for row in rows])
        error = gain.std(ddof=1) / np.sqrt(len(gain))
        print(f"| {name} | {values.mean():.3f} | {gain.mean():+.3f} ± {error:.3f} |")


def means(scores: RecordScores) -> np.ndarray:
    return scores.record_sums(scores.log_prob) / scores.lengths


# ---- without a model


def drawn(rng: np.random.Generator, n: int, models: int, effect: float):
    """The target's scores, membership, shadow scores and halves: difficulty + effect * seen + noise, in nats.

    Noise and effect differ from record to record by a factor of up to 3 and 4.
    """
    difficulty, noise = -4 + rng.normal(size=n), 0.1 + 0.2 * rng.random(n)
    effects = effect * (0.2 + 0.6 * rng.random(n))
    member, inside = rng.permutation(n) < n // 2, lira.halves(models, n, int(rng.integers(1 << 31)))
    shadow = np.minimum(difficulty + effects * inside + noise * rng.normal(size=(models, n)), -0.01)
    target = np.minimum(difficulty + effects * member + noise * rng.normal(size=n), -0.01)
    seen = norm.logpdf(target, difficulty + effects, noise)
    return target, member, shadow, inside, difficulty, seen - norm.logpdf(target, difficulty, noise)


def toy(draws: int) -> None:
    """Mean AUC over `draws` pools of 1000 records."""
    header = None
    for models in (2, 4, 8, 16, 32, 64, 128):
        rows = []
        for number in range(draws):
            target, member, shadow, inside, _, best = drawn(np.random.default_rng([models, number]), 1000, models, 0.5)
            scores = {"loss": target, "best possible": best} | ratios(target, shadow, inside)
            rows.append({name: auc(values[member], values[~member]) for name, values in scores.items()})
        if header is None:
            header = list(rows[0])
            print("| shadow models | " + " | ".join(header) + " |\n" + "|---" * (len(header) + 1) + "|")
        print(f"| {models} | " + " | ".join(f"{np.mean([r[name] for r in rows]):.3f}" for name in header) + " |")


def null(draws: int, n: int = 200, models: int = 8) -> None:
    """How often attacks and their combination see members among records that nothing was trained on."""
    counts: dict[str, list[tuple[bool, bool]]] = {}
    for number in range(draws):
        rng = np.random.default_rng([1, number])
        _, member, shadow, inside, difficulty, _ = drawn(rng, n, models, 0.5)
        unseen = np.minimum(difficulty + 0.2 * rng.normal(size=n), -0.01)  # the target saw neither side
        base = np.minimum(difficulty + 0.1 * rng.normal(size=n), -0.01)
        size = np.exp(rng.normal(4, 0.3, n)).astype(int)
        sides = [
            Evidence(
                one_token(unseen[mask]),
                one_token(base[mask]),
                size[mask],
                None,
                ShadowScores(shadow[:, mask], inside[:, mask], np.ones(mask.sum(), np.int64)),
            )
            for mask in (member, ~member)
        ]
        found = membership_scores(*sides)
        for name, scores in found.items():
            low, high = delong_interval(*scores)
            counts.setdefault(name, []).append((chance_p(*scores) <= 0.05, not low <= 0.5 <= high))
        both = combine(found, permutations=99, seed=number)
        plain = delong_interval(*both.scores)
        low, high = widened(plain, auc(*both.scores))
        counts.setdefault("combined", []).append((both.p <= 0.05, not low <= 0.5 <= high))
        counts.setdefault("combined, not widened", []).append((both.p <= 0.05, not plain[0] <= 0.5 <= plain[1]))
    print(
        f"| nothing to be found, {draws} draws of {n} records | p at most 0.05 | interval misses 0.5 |\n|---|---|---|"
    )
    for name, rows in counts.items():
        p, missed = np.mean(rows, axis=0)
        print(f"| {name} | {100 * p:.1f}% | {100 * missed:.1f}% |")


def one_token(log_prob: np.ndarray) -> RecordScores:
    """Records of one token each, with these scores."""
    n, places = len(log_prob), np.arange(len(log_prob))
    no, one = np.zeros(n, bool), np.ones(n)
    return RecordScores(log_prob, -4 * one, one, no, np.nan * one, places, places + 1, np.arange(n + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    real = commands.add_parser("model")
    real.add_argument("model")
    real.add_argument("--out", type=Path, required=True)
    real.add_argument("--records", type=int, default=100, help="of a side")
    real.add_argument("--shadows", type=int, default=8)
    real.add_argument("--epochs", type=int, default=2)
    real.add_argument("--learning-rate", type=float, default=5e-4)
    real.add_argument("--lora", type=int, default=0)
    real.add_argument("--seed", type=int, default=0)
    for name, draws in (("toy", 12), ("null", 200)):
        commands.add_parser(name).add_argument("--draws", type=int, default=draws)
    given = parser.parse_args()
    if given.command == "model":
        settings = ShadowSettings(given.epochs, given.learning_rate, lora=given.lora, seed=given.seed)
        measure(given.model, given.out, given.records, given.shadows, settings)
    else:
        {"toy": toy, "null": null}[given.command](given.draws)


if __name__ == "__main__":
    main()
