"""Do rows lie on something curved? A small autoencoder against principal components of equal width, on unseen rows.

The autoencoder is a linear map each way plus a bent one (one hidden layer), so that it can always do what PCA does. It
is fitted twice: from a random start, as usual, and from PCA itself. The step is chosen on rows of its own. The null is
a Gaussian cloud of the same covariance. It is not zero: of few dimensions a bent code can hold more than a straight one
of the same width by winding through them, Gaussian or not. What a curve is worth is the gain beyond the null's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from geoquant.geometry.nulls import gaussian_cloud
from geoquant.geometry.pictures import principal

__all__ = ["Encoded", "EncoderComparison", "compare_encoders"]

WIDTH, HIDDEN, STEPS, BATCH, RATE = 16, 128, 600, 128, 1e-2
CHECKS = 30  # how often the choosing rows are asked
HELD, CHOSEN = 0.2, 0.2  # shares of the rows that nothing sees, and of the others that choose the step
STARTS = ("random", "pca")


@dataclass(frozen=True)
class Encoded:
    """R^2 of the reconstructions, about the mean of the training rows: of PCA and of the autoencoder by its start.

    pca, random, started: (training, held out). gain, error: held-out R^2 of the better start on the choosing rows less
    that of PCA, and its standard error over held-out rows.
    """

    pca: tuple[float, float]
    random: tuple[float, float]
    started: tuple[float, float]
    gain: float
    error: float


@dataclass(frozen=True)
class EncoderComparison:
    """The rows, and a Gaussian cloud of their mean and covariance. rows: training and held out."""

    found: Encoded
    null: Encoded
    width: int
    rows: tuple[int, int]


def compare_encoders(
    points: Float[Tensor, "n D"],
    width: int = WIDTH,
    *,
    hidden: int = HIDDEN,
    steps: int = STEPS,
    seed: int = 0,
) -> EncoderComparison:
    """Both encoders on the rows and on their null, a fifth of the rows held out.

    Raises ValueError where the width leaves nothing to compare.
    """
    held = round(HELD * len(points))
    if not 0 < width < min(len(points) - 2 * held, points.shape[1]):
        raise ValueError(f"{tuple(points.shape)} points have no {width} components to be compared by")
    generator = torch.Generator().manual_seed(seed)
    cloud = gaussian_cloud(points.float(), generator)
    order = torch.randperm(len(points), generator=generator).to(points.device)
    found, null = (
        _encoded(each[order[held:]], each[order[:held]], width, hidden, steps, generator)
        for each in (points.detach().float(), cloud)
    )
    return EncoderComparison(found, null, width, (len(points) - held, held))


class _Autoencoder(nn.Module):
    def __init__(self, columns: int, width: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.down, self.up = nn.Linear(columns, width), nn.Linear(width, columns)
        self.into, self.bent_down = nn.Linear(columns, hidden), nn.Linear(hidden, width)
        self.back, self.bent_up = nn.Linear(width, hidden), nn.Linear(hidden, columns)
        with torch.no_grad():
            for part in self.children():
                start = torch.randn(part.weight.shape, generator=generator) / part.in_features**0.5
                part.weight.copy_(start)
                part.bias.zero_()

    def start(self, basis: Float[Tensor, "in width"]) -> None:
        """Be PCA."""
        with torch.no_grad():
            self.down.weight.copy_(basis.T)
            self.up.weight.copy_(basis)
            self.bent_down.weight.zero_()
            self.bent_up.weight.zero_()

    def forward(self, x: Float[Tensor, "b in"]) -> Float[Tensor, "b in"]:
        code = self.down(x) + self.bent_down(gelu(self.into(x)))
        return self.up(code) + self.bent_up(gelu(self.back(code)))


def _encoded(
    train: Float[Tensor, "n D"],
    test: Float[Tensor, "m D"],
    width: int,
    hidden: int,
    steps: int,
    generator: torch.Generator,
) -> Encoded:
    mean = train.mean(0)
    scale = (train - mean).square().mean().sqrt().clamp_min(1e-30)
    train, test = (train - mean) / scale, (test - mean) / scale
    basis = principal(train, width)[1].float()

    def errors(x: Tensor, model: nn.Module | None) -> Float[Tensor, " b"]:
        with torch.no_grad():
            return (x - (x @ basis @ basis.T if model is None else model(x))).square().sum(1).double()

    def shares(model: nn.Module | None) -> tuple[float, float]:
        return tuple(1 - (errors(x, model).sum() / x.double().square().sum()).item() for x in (train, test))

    choosing, fitting = train[: round(CHOSEN * len(train))], train[round(CHOSEN * len(train)) :]
    models = {}
    for start in STARTS:
        model = _Autoencoder(train.shape[1], width, hidden, generator).to(train.device)
        if start == "pca":
            model.start(principal(fitting, width)[1].float())
        models[start] = _fitted(model, fitting, choosing, steps, generator)
    better = min(STARTS, key=lambda start: errors(choosing, models[start]).sum().item())
    gains = (errors(test, None) - errors(test, models[better])) / test.double().square().sum(1).mean()
    return Encoded(
        pca=shares(None),
        random=shares(models["random"]),
        started=shares(models["pca"]),
        gain=gains.mean().item(),
        error=(gains.std() / len(gains) ** 0.5).item(),
    )


def _fitted(model: nn.Module, fitting: Tensor, choosing: Tensor, steps: int, generator: torch.Generator) -> nn.Module:
    """The model as it was best on the choosing rows, the start counted in."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = torch.inf, model
    for step in range(steps + 1):
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            with torch.no_grad():
                loss = (choosing - model(choosing)).square().mean().item()
            if loss < best:
                best, kept = loss, copy.deepcopy(model)
        batch = torch.randint(len(fitting), (min(BATCH, len(fitting)),), generator=generator).to(fitting.device)
        optimizer.zero_grad(set_to_none=True)
        (fitting[batch] - model(fitting[batch])).square().mean().backward()
        optimizer.step()
        schedule.step()
    return kept
