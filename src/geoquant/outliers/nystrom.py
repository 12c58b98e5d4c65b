"""Low-rank Fisher matrices from gradients, without ever forming the matrix.

Samples (n, ...) are gradients, flattened to the rows of B (n, d); the matrix is `F = B^T B`, d x d, so that a caller
who wants a mean divides the samples by the root of their number first. Three ways to its leading part, all as
`sum_k values_k v_k v_k^T`:

all samples   exact: eigenvectors of the n x n matrix B B^T.
landmarks     Nystrom on some coordinates L: `F_:L F_LL^+ F_L:`. With Q an orthonormal basis of the columns B_:L that
              is `(Q^T B)^T (Q^T B)`, so neither F_LL nor its inverse is needed, and what is left out is again positive
              semidefinite. Equal to F where the landmarks reach its rank.
sketch        the same with random combinations of the coordinates in place of some of them.

Williams and Seeger: Using the Nystrom method to speed up kernel machines, NIPS 2000; landmarks drawn by the diagonal as
in Drineas and Mahoney: On the Nystrom method for approximating a Gram matrix, JMLR 2005 (here without replacement);
sketches as in Gittens and Mahoney: Revisiting the Nystrom method, JMLR 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ENERGY", "LowRank", "draw_landmarks", "low_rank", "low_rank_product", "nystrom"]

ENERGY = 0.99
SMALLEST = 1e-10  # of the largest eigenvalue: below is rounding


@dataclass(frozen=True)
class LowRank:
    """A positive semidefinite matrix of rank r over weights of any shape.

    values:  (r,) eigenvalues, the largest first.
    vectors: (r, ...) orthonormal eigenvectors in the shape of the weights.
    energy:  trace of this matrix over the trace of the one that it stands for; at most one. One for the zero matrix.
    """

    values: Float[Tensor, " r"]
    vectors: Float[Tensor, "r ..."]
    energy: float

    def apply(self, change: Tensor) -> Tensor:
        """The matrix times a change of the weights."""
        flat = self.vectors.flatten(1)
        return (flat.T @ (self.values * (flat @ change.flatten()))).view_as(change)

    def quadratic(self, change: Tensor) -> Float[Tensor, ""]:
        """`change^T F change`."""
        return (self.values * (self.vectors.flatten(1) @ change.flatten()).square()).sum()

    def diagonal(self) -> Tensor:
        """Its diagonal, in the shape of the weights."""
        return torch.tensordot(self.values, self.vectors.square(), dims=1)


def low_rank(samples: Float[Tensor, "n ..."], energy: float = ENERGY) -> LowRank:
    """The fewest leading eigenpairs of `B^T B` that hold `energy` of its trace.

    Raises ValueError for an energy outside (0, 1].
    """
    return _leading(samples.flatten(1), samples.shape[1:], samples.double().square().sum(), energy)


def low_rank_product(
    samples: Float[Tensor, "n ..."], change: Float[Tensor, ...], energy: float = ENERGY
) -> Float[Tensor, ...]:
    """`low_rank(samples, energy).apply(change)` without its eigenvectors, which are as large as the samples.

    With u the eigenvectors of B B^T that are kept it is `B^T u u^T B change`.
    """
    flat = samples.flatten(1)
    gram = (flat @ flat.T).double()
    _, left = _kept(gram, gram.trace(), energy)
    left = left.to(flat.dtype)
    return (flat.T @ (left @ (left.T @ (flat @ change.flatten())))).view_as(change)


def nystrom(
    samples: Float[Tensor, "n ..."],
    landmarks: Int[Tensor, " m"] | int,
    generator: torch.Generator | None = None,
    energy: float = ENERGY,
) -> LowRank:
    """The fewest leading eigenpairs of a Nystrom approximation of `B^T B` that hold `energy` of the trace of F.

    landmarks: coordinates of the flattened weights; or a number of random combinations of all of them, which need the
    generator. Where they do not reach the energy, all that they reach is returned, and `LowRank.energy` says how much.
    """
    flat = samples.flatten(1)
    if isinstance(landmarks, int):
        if generator is None:
            raise ValueError("random combinations need a generator")
        mixed = torch.randn(flat.shape[1], landmarks, generator=generator, dtype=flat.dtype).to(flat.device)
        reached = flat @ mixed
    else:
        reached = flat[:, landmarks]
    left, sizes, _ = torch.linalg.svd(reached.double(), full_matrices=False)
    basis = left[:, sizes > SMALLEST**0.5 * sizes.max()].to(flat.dtype)
    return _leading(basis.T @ flat, samples.shape[1:], samples.double().square().sum(), energy)


def draw_landmarks(samples: Float[Tensor, "n ..."], count: int, generator: torch.Generator) -> Int[Tensor, " m"]:
    """Coordinates drawn without replacement with a chance that grows with the diagonal of F; those of zero never."""
    diagonal = samples.flatten(1).double().square().sum(0)
    # Of exponential variables the `count` smallest ratios are such a draw, and torch's own stops at 2^24 coordinates.
    waits = torch.empty(diagonal.shape, dtype=torch.float64).exponential_(generator=generator).to(diagonal.device)
    order = (waits / diagonal).topk(min(count, int((diagonal > 0).sum())), largest=False)
    return order.indices


def _leading(rows: Float[Tensor, "n d"], shape: torch.Size, trace: Tensor, energy: float) -> LowRank:
    """Eigenpairs of `rows^T rows` from those of `rows rows^T`, until `energy` of `trace` is reached."""
    exact = rows.double()
    values, left = _kept(exact @ exact.T, trace, energy)
    vectors = (left / values.sqrt()).T @ exact
    held = (values.sum() / trace).item() if trace > 0 else 1.0
    return LowRank(values.to(rows.dtype), vectors.to(rows.dtype).view(-1, *shape), min(held, 1.0))


def _kept(gram: Float[Tensor, "n n"], trace: Tensor, energy: float) -> tuple[Float[Tensor, " r"], Float[Tensor, "n r"]]:
    """The fewest leading eigenpairs of `gram` that hold `energy` of `trace`."""
    if not 0 < energy <= 1:
        raise ValueError(f"0 < energy <= 1 must hold, but got {energy}")
    values, left = torch.linalg.eigh(gram)
    values, left = values.flip(0).clamp_min(0), left.flip(1)
    before = values.cumsum(0) - values
    # Single precision in the samples leaves about this much of the trace undecided.
    used = (before < energy * trace * (1 - 1e-9)) & (values > SMALLEST * values[:1])
    return values[used], left[:, used]
