"""Audit of the mechanisms behind a guarantee: what they claim, what attacks disprove, and what broken ones show.

    python benchmarks/guarantee.py mechanisms      many runs of each mechanism on neighbouring inputs
    python benchmarks/guarantee.py one-run MODEL   one release of a model's matrix, a thousand canaries in it
    python benchmarks/guarantee.py matrix [BASE TUNED]   the noises of a published control matrix, what they guarantee

Tables in markdown on stdout. A bound is a lower one: it disproves a claim or does not, and proves none.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from geoquant.plan.published import PUBLISHED
from geoquant.privacy.guarantee.adjacency import WeightBall, euclidean
from geoquant.privacy.guarantee.gaussian import gaussian_epsilon, gaussian_mu
from geoquant.privacy.guarantee.noise import drawn, on_lattice, released
from geoquant.privacy.guarantee.pairs import weight_pairs
from geoquant.privacy.guarantee.price import bits_left
from geoquant.privacy.guarantee.provenance import Public, private
from geoquant.privacy.guarantee.shards import noisy_mean
from geoquant.privacy.guarantee.weight_ball import release
from geoquant.privacy.two_point import Pair, audit_pairs
from geoquant.privacy.weight_canaries import audit_quantizer

DELTA, SIGMA = 1e-5, 1.2  # steps of the grid
X = np.array([0.1, 0.3, -0.6, 7.0])
CLIP, SHARDS = 1.0, 2
NOISE = 2.0  # of the one-run audit, in steps: far more than what rounding hides by itself

Run = Callable[[np.ndarray, int], np.ndarray]


def noised(x: np.ndarray, runs: int, sigma: float = SIGMA) -> np.ndarray:
    """The mechanism on copies of x."""
    copies = np.broadcast_to(x, (runs, len(x)))
    return released(on_lattice(copies, sigma) + drawn(copies.shape), sigma)


def ball(x: np.ndarray, runs: int) -> np.ndarray:
    """The public call, then rounding."""
    rows, zero = torch.tensor(x).expand(runs, len(x)), torch.zeros(runs, len(x))
    epsilon = gaussian_epsilon(DELTA, 1 / SIGMA)
    out = release(
        private({"w": rows}, "m"), {"w": Public(zero, "zero")}, WeightBall(1.0, euclidean()),
        epsilon=epsilon, delta=DELTA,
    )  # fmt: skip
    return np.rint(out.tensors["w"].values.double().numpy())


def shards(sensitivity: float) -> Run:
    """A mean of two clipped changes, with noise for a stated sensitivity in units of C / k."""
    sigma = SIGMA * sensitivity * CLIP / SHARDS

    def run(x: np.ndarray, runs: int) -> np.ndarray:
        return noisy_mean((np.broadcast_to(change, (runs, 1)) for change in x), SHARDS, sigma)[0]

    return run


def beside(values: np.ndarray, more: object, runs: int) -> np.ndarray:
    return np.column_stack([values, np.full(runs, more)])


def private_scales(x: np.ndarray, runs: int) -> np.ndarray:
    step = np.abs(x).max() / 7
    return beside(np.rint(noised(x, runs) / step) * step, step, runs)


def private_order(x: np.ndarray, runs: int) -> np.ndarray:
    return beside(np.rint(noised(x, runs)), np.argsort(np.abs(x))[0], runs)


def kept_without_noise(x: np.ndarray, runs: int) -> np.ndarray:
    out = np.rint(noised(x, runs))
    out[:, 3] = np.float16(x[3])
    return out


def private_compensation(x: np.ndarray, runs: int) -> np.ndarray:
    """Column 1 absorbs the error of column 0, measured on its un-noised weight."""
    out = noised(x, runs)
    out[:, 0] = np.rint(out[:, 0])
    out[:, 1] += 2 * (x[0] - out[:, 0])
    return out


def private_subset(x: np.ndarray, runs: int) -> np.ndarray:
    return np.where(np.abs(x) >= 5.0, noised(x, runs), x)


def rounded_first(x: np.ndarray, runs: int) -> np.ndarray:
    return np.rint(x) + np.rint(noised(np.zeros(len(x)), runs))


def stored_seed(x: np.ndarray, runs: int) -> np.ndarray:
    again = SIGMA * np.random.default_rng(7).normal(size=(runs, len(x)))
    return x + SIGMA * np.random.default_rng(7).normal(size=(runs, len(x))) - again


def to_nearest(x: np.ndarray, runs: int) -> np.ndarray:
    return np.broadcast_to(np.rint(x), (runs, len(x)))


def stochastic(x: np.ndarray, runs: int) -> np.ndarray:
    return np.floor(x + np.random.default_rng(1).random((runs, len(x))))


PAIRS, BESIDE = weight_pairs(X, 1.0), weight_pairs(X, 1.0, further=1)
START = PAIRS[0].one
ONE = [Pair("a step apart", np.zeros(1), np.ones(1), 1.0)]
RECORD = [Pair("a turned shard", np.array([[0.3], [1.0]]), np.array([[0.3], [-1.0]]), 1.0)]
TWICE = [Pair("both columns read", START, START + np.eye(4)[0], 1.0, lambda out: 5 * out[:, 0] + 2 * out[:, 1])]

# Name, run, pairs, whether it keeps its word, how quantize treats it.
MECHANISMS: list[tuple[str, Run, list[Pair], bool, str]] = [
    ("noise, then rounding (weight ball)", ball, PAIRS, True, "the mechanism"),
    ("mean of shards, sensitivity 2C/k", shards(2.0), RECORD, True, "the mechanism"),
    ("mean of shards, sensitivity C/k", shards(1.0), RECORD, False, "fixed in the accounting"),
    ("half the noise", lambda x, n: noised(x, n, SIGMA / 2), ONE, False, "statement checks its own accounting"),
    ("scales from private weights", private_scales, BESIDE, False, "type error"),
    ("order from private weights", private_order, BESIDE, False, "type error"),
    ("kept column without noise", kept_without_noise, PAIRS, False, "type error"),
    ("compensation from private weights", private_compensation, TWICE, False, "type error"),
    ("noise on a private subset", private_subset, PAIRS, False, "refused"),
    ("rounding before noise", rounded_first, PAIRS, False, "type error"),
    ("a stored seed", stored_seed, PAIRS, False, "refused"),
    ("rounding to nearest", to_nearest, PAIRS, False, "refused"),
    ("stochastic rounding", stochastic, PAIRS, False, "refused"),
]


def mechanisms(runs: int, confidence: float) -> None:
    """Per mechanism the pair that shows most, beyond what is claimed for it."""
    print(f"{runs:,} runs of each side, confidence {confidence:g} over all pairs of a mechanism, delta {DELTA:g}.\n")
    print("| mechanism | pair that shows most | claimed epsilon there | shown at least | disproved | in `quantize` |")
    print("| --- | --- | ---: | ---: | --- | --- |")
    for name, run, pairs, sound, treated in MECHANISMS:
        found = audit_pairs(run, pairs, claimed, delta=DELTA, runs=runs, confidence=confidence)
        most = max(found, key=lambda one: (one.caught, one.epsilon))
        said = "no" if not most.caught else "**yes**"
        print(f"| {name} | {most.name} | {most.claimed:.2f} | {most.epsilon:.2f} | {said} | {treated} |")
        if most.caught == sound:
            print(f"\n**{name}: {'contradicted' if sound else 'not found out'}**\n")


def claimed(distance: float) -> float:
    """What noise of SIGMA on every weight gives."""
    return gaussian_epsilon(DELTA, distance / SIGMA)


def one_run(model: str, canaries: int, seeds: int) -> None:
    """One release of the widest matrix of a model's last block; canaries of a norm for which epsilon 8 is claimed."""
    from geoquant.model.load import load
    from geoquant.model.walk import read_weight, site_modules

    modules = site_modules(load(model).model)
    name, weight = max(
        ((name, read_weight(module).float()) for name, module in modules.items()),
        key=lambda entry: (entry[1].numel(), entry[0]),
    )
    step = float(weight.abs().amax(1).mean()) / 7  # of a 4-bit grid, public in this audit
    print(f"{name}, {weight.shape[0]} x {weight.shape[1]}, {canaries} canaries, confidence 0.95, delta {DELTA:g}.\n")
    print("| sigma, canaries | claimed epsilon | noise | shown at least, one release each | guesses right |")
    print("| --- | ---: | --- | --- | --- |")
    for epsilon in (8.0, 2.0):
        sigma = NOISE * step
        radius = sigma * gaussian_mu(epsilon, DELTA)
        for words, share in (("as stated", 1.0), ("a quarter of it", 0.25), ("none", 0.0)):

            def released_once(w: torch.Tensor, share: float = share, sigma: float = sigma) -> torch.Tensor:
                out = w.double().numpy()
                if share:
                    out = released(on_lattice(out, share * sigma) + drawn(out.shape), share * sigma)
                return torch.from_numpy(np.rint(out / step) * step)

            bounds = [
                audit_quantizer(released_once, weight, radius, canaries=canaries, delta=DELTA, seed=seed)
                for seed in range(seeds)
            ]
            shown = ", ".join(f"{bound.epsilon:.2f}" for bound in bounds)
            right = ", ".join(f"{bound.correct}/{bound.guesses}" for bound in bounds)
            print(f"| {NOISE:g} steps, norm {radius / step:.2f} steps | {epsilon:g} | {words} | {shown} | {right} |")


def matrix(distance: float) -> None:
    """Epsilon depends on the distance of neighbours, which the published table does not state."""
    rows = [(one.epsilon, one.noise) for one in PUBLISHED if one.noise]
    columns = ("published epsilon", "noise, steps", "4 bits leave", "holds for weight vectors within, steps")
    print(f"| {' | '.join(columns)} | epsilon at 1 step | at 10 steps | at a fine-tune |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for epsilon, sigma in rows:
        radius = sigma * gaussian_mu(epsilon, DELTA)
        others = " | ".join(_epsilon(apart / sigma) for apart in (1.0, 10.0, distance))
        print(f"| {epsilon:g} | {sigma:g} | {bits_left(4, sigma):.2f} bits | {radius:.3f} | {others} |")
    print(f"\nA fine-tune: {distance:,.0f} steps from its base. Noise that would hide it, by epsilon:\n")
    print("| epsilon | sigma / distance | sigma, steps | 4 bits leave |\n| ---: | ---: | ---: | ---: |")
    for epsilon in (8.0, 4.0, 2.0, 1.0):
        ratio = 1 / gaussian_mu(epsilon, DELTA)
        print(f"| {epsilon:g} | {ratio:.3f} | {ratio * distance:,.0f} | {bits_left(4, ratio * distance):.1f} bits |")


def _epsilon(mu: float) -> str:
    """Exact where the accounting goes so far; `mu^2 / 2 + mu z` beyond, which it approaches."""
    return f"{gaussian_epsilon(DELTA, mu):,.1f}" if mu < 1000 else f"{mu * mu / 2:,.0f}"


def distance_of(base: str, tuned: str) -> float:
    """`|| (w - base) / step ||` over all matrices, step of symmetric 4 bits in groups of 64 of the base."""
    from geoquant.model.load import load

    public, total = dict(load(base).model.named_parameters()), 0.0
    for name, own in load(tuned).model.named_parameters():
        start = public[name].detach().float()
        if own.ndim == 2 and own.shape[1] % 64 == 0:
            step = start.unflatten(1, (-1, 64)).abs().amax(2, keepdim=True).clamp_min(1e-12) / 7
            change = (own.detach().float() - start).unflatten(1, (-1, 64))
            total += float((change / step).double().square().sum())
    return math.sqrt(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("mechanisms", "one-run", "matrix"))
    parser.add_argument("models", nargs="*", help="one-run: MODEL; matrix: BASE and its fine-tune")
    parser.add_argument("--runs", type=int, default=400_000)
    parser.add_argument("--confidence", type=float, default=0.999)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    started = time.process_time()
    if given.what == "mechanisms":
        mechanisms(given.runs, given.confidence)
    elif given.what == "one-run":
        one_run(given.models[0] if given.models else "demo", given.canaries, given.seeds)
    else:
        matrix(distance_of(*given.models) if given.models else 688.0)
    print(f"\n{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
