"""Density of points in the plane, for the picture, and its modes.

Gaussian kernels with the points' own covariance and Scott's width (Scott: Multivariate density estimation, Wiley 1992).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["Density", "density"]

GRID = 64
MARGIN = 0.3  # of the range, beyond the outermost points
LEAST = 0.1  # of the highest mode: lower ones are ripples of single points


@dataclass(frozen=True)
class Density:
    """Density on a grid: values[i, j] at (x[i], y[j]), per product of the units of both axes.

    modes: (modes, 2) places of local maxima on the grid, the highest first; heights: density there.
    """

    x: Float[np.ndarray, " grid"]
    y: Float[np.ndarray, " grid"]
    values: Float[np.ndarray, "grid grid"]
    modes: Float[np.ndarray, "modes two"]
    heights: Float[np.ndarray, " modes"]


def density(points: Float[np.ndarray, "n two"], grid: int = GRID) -> Density | None:
    """Density of the points, or None where they have none: fewer than three, or all on one line."""
    from scipy.ndimage import maximum_filter
    from scipy.stats import gaussian_kde

    points = np.asarray(points, dtype=np.float64)
    spread = np.ptp(points, axis=0)
    if len(points) < 3 or not (spread > 0).all() or np.linalg.matrix_rank((points - points.mean(0)) / spread) < 2:
        return None
    axes = [
        np.linspace(column.min() - MARGIN * width, column.max() + MARGIN * width, grid)
        for column, width in zip(points.T, spread)
    ]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    # In units of the spread: axes of very different units have an ill-conditioned covariance otherwise.
    kernel = gaussian_kde((points / spread).T)
    values = kernel((places.reshape(2, -1).T / spread).T).reshape(grid, grid) / spread.prod()
    peaks = (values == maximum_filter(values, 3)) & (values >= LEAST * values.max())
    order = np.argsort(-values[peaks])
    return Density(*axes, values, places[:, peaks].T[order], values[peaks][order])
