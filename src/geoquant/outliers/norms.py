"""What the gain of a norm does to large channels: does it amplify them, or damp them?

    amplification = (max_j / median_j of channel amplitude after the gain) / (the same before it)

The amplitude of a channel is its root mean square over tokens, of the normalised input. The null is the same gain in a
random order: gains that are spread widely change max/median whatever they are applied to.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.geometry.islands import rank_correlation

__all__ = ["GainSums", "NormGain", "NormGains", "find_norms", "norm_gain"]

SHUFFLES = 199
FIT = 0.01  # of the output's energy that a norm may leave unexplained


def find_norms(block: nn.Module) -> dict[str, nn.Module]:
    """The modules that normalise, by their name inside the block: no children, and a class that is called so."""
    return {
        name: module
        for name, module in block.named_modules()
        if "norm" in type(module).__name__.lower() and not any(module.children())
    }


@dataclass
class GainSums:
    """Sums over tokens, per channel, from which a norm's gain follows: of n^2, n y and y^2, with y the output less its
    bias and n the input normalised in each of two ways (by its root mean square, or after taking away its mean).
    """

    epsilon: float = 0.0
    sums: dict[bool, Float[Tensor, "3 channels"]] | None = None

    def add(self, x: Float[Tensor, "... channels"], y: Float[Tensor, "... channels"]) -> None:
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        found = {}
        for centred in (False, True):
            n = x - x.mean(1, keepdim=True) if centred else x
            n = n * (n.square().mean(1, keepdim=True) + self.epsilon).clamp_min(1e-30).rsqrt()
            found[centred] = torch.stack([n.square().sum(0), (n * y).sum(0), y.square().sum(0)]).double()
        self.sums = found if self.sums is None else {key: self.sums[key] + found[key] for key in found}

    def fit(self) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]] | None:
        """Gain and amplitude before it; None where the output is no normalised input times a gain per channel."""
        for squares, product, energy in (self.sums or {}).values():
            gain = product / squares.clamp_min(1e-30)
            if (energy - gain * product).sum() <= FIT * energy.sum():
                return gain.float(), squares.float().sqrt()
        return None


@dataclass(frozen=True)
class NormGain:
    """One norm.

    amplification: see above. shuffled: the null, the median of the same with the gains in a random order, and p the
    share of such orders that amplify at least as much. spearman: rank correlation of |gain| with the amplitude before
    it; error: its standard error where they know nothing of each other. None for gains that are all alike.
    """

    name: str
    block: int
    channels: int
    amplification: float
    shuffled: float
    p: float
    spearman: float | None
    error: float


def norm_gain(
    name: str,
    block: int,
    gain: Float[Tensor, " channels"],
    amplitude: Float[Tensor, " channels"],
    generator: torch.Generator,
) -> NormGain:
    """A norm's figures from its gain and the amplitudes of its channels before the gain."""
    gain, amplitude = gain.abs().cpu(), amplitude.cpu()
    before = _peak(amplitude[None])
    orders = torch.rand(SHUFFLES, len(gain), generator=generator).argsort(1)
    null = _peak(gain[orders] * amplitude) / before
    found = (_peak((gain * amplitude)[None]) / before).item()
    order = rank_correlation(gain, amplitude)
    return NormGain(
        name=name,
        block=block,
        channels=len(gain),
        amplification=found,
        shuffled=null.median().item(),
        p=((null >= found).sum().item() + 1) / (SHUFFLES + 1),
        spearman=None if math.isnan(order) else order,  # NaN is no JSON
        error=(len(gain) - 1) ** -0.5 if len(gain) > 1 else 1.0,
    )


def _peak(amplitudes: Float[Tensor, "n channels"]) -> Float[Tensor, " n"]:
    """max / median of each row."""
    return amplitudes.amax(1) / amplitudes.median(1).values.clamp_min(1e-30)


@dataclass(frozen=True)
class NormGains:
    """All norms of the blocks, in the order of the module tree."""

    norms: tuple[NormGain, ...]

    def to_dict(self) -> dict:
        return {"norms": [asdict(norm) for norm in self.norms]}

    def finding(self) -> str:
        if not self.norms:
            return "Norm gains: no norm was found in the blocks."
        above = [norm for norm in self.norms if norm.amplification > 1 and norm.p <= 0.05]
        most = max(self.norms, key=lambda norm: norm.amplification)
        ranks = sorted(norm.spearman for norm in self.norms if norm.spearman is not None)
        middle = torch.tensor(ranks).median().item() if ranks else 0.0
        error = max(norm.error for norm in self.norms)
        sense = "damps" if middle < -2 * error else "amplifies" if middle > 2 * error else "ignores"
        text = (
            f"Norm gains: {len(above)} of {len(self.norms)} norms raise max/median of the channels beyond the same "
            f"gains in a random order (p <= 0.05), most in {most.name} (x{most.amplification:.2g}, random order "
            f"x{most.shuffled:.2g})"
        )
        if ranks:
            text += f"; as a rule the gain {sense} large channels (median rank correlation {middle:+.2f})"
        return text + "."
