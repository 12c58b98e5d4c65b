"""Leading eigenpairs and trace of a symmetric positive semidefinite operator that is known by its products only.

Eigenpairs by ARPACK's implicitly restarted Lanczos method (Lehoucq, Sorensen, Yang: ARPACK users' guide, SIAM 1998),
each measured afterwards by its residual. A small residual says that the pair is one, not that no larger one was
missed: of an eigenvalue that repeats, a Krylov space holds one copy, and only rounding brings in the others. So what
is found is taken out and the rest is searched again from another start, until nothing larger is left.

Trace by random signs: Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
splines, Communications in Statistics: Simulation and Computation, 1989.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Eigenpairs", "Trace", "stochastic_trace", "top_eigenpairs"]

Operator = Callable[[Tensor], Tensor]
ROUNDING = 100  # units of rounding that a product may be off by, relative to the largest eigenvalue


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues found, descending, with their vectors.

    values: (found,) float64. vectors: (n, found) orthonormal; fewer than `wanted` where the limit was reached.
    residuals: (found,) `||A v - lambda v|| / lambda`, measured; about 1 or more for an eigenvalue of zero.
    products: how many were used. at_least: the largest quotient `v^T A v / v^T v` met, which the largest eigenvalue
    cannot be below, found or not (NaN after a product that is not finite, which ends the search). converged: whether
    all that were wanted were found to the tolerance, and nothing larger by the second search (where `again`).
    """

    values: Float[Tensor, " found"]
    vectors: Float[Tensor, "n found"]
    residuals: Float[Tensor, " found"]
    wanted: int
    products: int
    at_least: float
    converged: bool


@dataclass(frozen=True)
class Trace:
    """An estimated trace, its standard error over probes (NaN for one probe), and the products used."""

    value: float
    se: float
    products: int


def top_eigenpairs(
    product: Operator,
    size: int,
    k: int,
    *,
    tolerance: float = 1e-4,
    limit: int = 1000,
    spare: int | None = None,
    again: bool = True,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Eigenpairs:
    """The k largest eigenpairs of a symmetric positive semidefinite operator on vectors of `size` numbers.

    product: v -> A v, called with vectors of `dtype` on `device`. tolerance: of residuals, relative to each
    eigenvalue. limit: products after which a search stops; the restart under way is finished. spare: vectors that the
    method keeps beyond the k (default k + 1, at least 20 - k): more of them take memory and save products.
    again: search the rest for what was missed; worth its products unless eigenvalues are known to differ.
    Where the space is no larger than what would be kept, the matrix is formed and solved densely.
    Raises ValueError where k is not between 1 and `size`.
    """
    if not 0 < k <= size:
        raise ValueError(f"an operator of size {size} has {size} eigenpairs, not {k}")
    kept = k + max(k + 1, 20 - k) if spare is None else k + max(1, spare)
    counted = _Counted(product, dtype, device)
    complete = True
    try:
        if kept >= size:  # no saving left
            values, vectors = _dense(counted, size, k)
        else:
            values, vectors, complete = _restarted(counted, size, k, kept, tolerance, limit, seed, again)
    except _NoNumber:
        values, vectors = np.zeros(0), np.zeros((size, 0))
    order = np.argsort(values)[::-1]
    return _measured(counted, values[order], vectors[:, order], k, tolerance, complete)


def _dense(counted: _Counted, size: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    matrix = np.stack([counted(axis) for axis in np.eye(size)], 1).astype(np.float64)
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return values[-k:], vectors[:, -k:]


def _restarted(
    counted: _Counted, size: int, k: int, kept: int, tolerance: float, limit: int, seed: int, again: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Values, vectors, and whether nothing was missed as far as was asked."""
    generator = np.random.default_rng(seed)
    start = generator.standard_normal(size).astype(counted.number)
    # ARPACK compares with absolute numbers too: the unit of the operator must not matter.
    scale = np.linalg.norm(counted(start)) / np.linalg.norm(start)
    if scale == 0:
        return np.zeros(0), np.zeros((size, 0)), False
    values, vectors = _arpack(counted, scale, start, k, kept, tolerance, limit)
    complete = not again
    for _ in range(k if again and len(values) == k else 0):
        start = generator.standard_normal(size).astype(counted.number)
        value, vector = _arpack(counted, scale, start, 1, 1 + kept - k, tolerance, limit, without=vectors)
        if len(value) and value[0] > values.min() * (1 + tolerance):
            stay = np.argsort(values)[1:]
            values, vectors = np.append(values[stay], value), np.column_stack([vectors[:, stay], vector])
        else:
            complete = bool(len(value))
            break
    return values, vectors, complete


def _arpack(
    counted: _Counted,
    scale: float,
    start: np.ndarray,
    k: int,
    kept: int,
    tolerance: float,
    limit: int,
    without: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k largest pairs, or those of them that were found in time; `without` is a space to stay out of."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    def outside(v: np.ndarray) -> np.ndarray:
        return v if without is None else v - without @ (without.T @ v)

    operator = LinearOperator(
        (len(start), len(start)),
        matvec=lambda v: outside(counted(outside(v.reshape(-1)))) / counted.number(scale),
        dtype=counted.number,
    )
    restarts = max(1, (limit - k) // (kept - k))
    try:
        values, vectors = eigsh(
            operator, k, which="LA", ncv=kept, maxiter=restarts, tol=tolerance / 2, v0=outside(start)
        )
    except ArpackNoConvergence as stopped:
        values, vectors = stopped.eigenvalues, stopped.eigenvectors
    return values * scale, vectors


class _NoNumber(ArithmeticError):
    """A product that is not finite: nothing that comes after it would be."""


class _Counted:
    """The operator on numpy vectors, which counts its products and keeps the largest Rayleigh quotient."""

    def __init__(self, product: Operator, dtype: torch.dtype, device: torch.device | str):
        self.product, self.dtype, self.device = product, dtype, device
        self.number = np.float32 if dtype == torch.float32 else np.float64
        self.products = 0
        self.at_least = 0.0

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        v = torch.tensor(vector.reshape(-1), dtype=self.dtype, device=self.device)
        found = self.product(v)
        self.products += 1
        if not found.isfinite().all():
            self.at_least = float("nan")
            raise _NoNumber
        self.at_least = max(self.at_least, (v.double() @ found.double() / v.double().square().sum()).item())
        return found.detach().cpu().to(self.dtype).numpy().astype(self.number)


def _measured(
    counted: _Counted, values: np.ndarray, vectors: np.ndarray, k: int, tolerance: float, complete: bool
) -> Eigenpairs:
    """The pairs with a residual that one more product each has shown."""
    errors = np.array(
        [np.linalg.norm(counted(v).astype(np.float64) - value * v) for value, v in zip(values, vectors.T)]
    )
    floor = ROUNDING * np.finfo(counted.number).eps * counted.at_least
    with np.errstate(divide="ignore", invalid="ignore"):
        residuals = errors / values
    return Eigenpairs(
        values=torch.from_numpy(values.astype(np.float64)),
        vectors=torch.from_numpy(vectors.copy()),
        residuals=torch.from_numpy(residuals),
        wanted=k,
        products=counted.products,
        at_least=counted.at_least,
        converged=complete and len(values) == k and bool((errors <= tolerance * values + floor).all()),
    )


def stochastic_trace(
    product: Operator,
    size: int,
    probes: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Trace:
    """Mean of `z^T A z` over probes of random signs.

    Unbiased; the variance of one probe is `2 (||A||_F^2 - sum_i A_ii^2)`, so that a diagonal matrix needs one.
    """
    found = []
    for _ in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        z = signs.to(device, dtype)
        found.append((z.double() @ product(z).double()).item())
    values = np.array(found)
    se = values.std(ddof=1) / probes**0.5 if probes > 1 else float("nan")
    return Trace(float(values.mean()), float(se), probes)
