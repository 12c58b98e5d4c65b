"""What clipping the inputs of the sites costs at their outputs, and whether the tail tells which clip is better.

Errors of the inputs are no judge: a column counts by the weights that read it. The judge is the error of a site's
output on tokens that no clip was chosen on, `tr(W dX^T dX W^T)`. Where one token holds most of the energy (an attention
sink), that is the error of one token; so the mean over tokens of each one's own relative error stands beside it. It is
no better judge: to it a sink that was cut off is one token among many, to the model it is not. Which of both orders the
clips as the perplexity does is printed by `benchmarks/activation_clip.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoquant.model.halves import widened
from geoquant.model.walk import Block, Stage, read_weight
from geoquant.observe.stream import hooks
from geoquant.outliers.histogram import Histogram, collect

__all__ = ["Mixed", "OutputError", "adapt_tau", "input_histograms", "judge_mixed", "output_error", "output_errors"]

Quantizer = Callable[[Tensor], Tensor]
BATCH = 4


@dataclass(frozen=True)
class OutputError:
    """Relative squared error of the outputs: of all tokens together, and the mean of each token's own."""

    energy: float
    token: float


def output_error(
    weight: Float[Tensor, "out in"], x: Float[Tensor, "tokens in"], quantized: Float[Tensor, "tokens in"]
) -> Float[Tensor, "2 tokens"]:
    """Per token: `||W (q - x)||^2` and `||W x||^2`. The sum of the first is `tr(W dX^T dX W^T)`."""
    return torch.stack([((quantized - x) @ weight.T).square().sum(1), (x @ weight.T).square().sum(1)])


def _watch(
    model: nn.Module,
    blocks: tuple[Block, ...],
    tokens: Int[Tensor, "n length"],
    see: Callable[[Stage, Float[Tensor, "b length in"]], None],
) -> None:
    """Show the input of every stage, batch by batch, as float32."""

    def watcher(stage: Stage) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            see(stage, (args[0] if args else next(iter(kwargs.values()))).float())

        return hook

    device = next(model.parameters()).device
    stages = [(stage, model.get_submodule(stage.name)) for block in blocks for stage in block.stages]
    handles = [module.register_forward_pre_hook(watcher(stage), with_kwargs=True) for stage, module in stages]
    with hooks(handles), torch.no_grad(), widened(device):
        for batch in tokens.split(BATCH):
            model.base_model(batch.to(device), use_cache=False)


def input_histograms(
    model: nn.Module, blocks: tuple[Block, ...], tokens: Int[Tensor, "n length"], skip: int = 0
) -> dict[str, Histogram]:
    """The histogram of each stage's inputs, by the name of the stage, without the first `skip` tokens of each window.

    A stage that no token reached (an idle expert) is absent. Raises ValueError for a `skip` where a stage's tokens
    come without their places (most experts').
    """
    found: dict[str, Histogram] = {}

    def see(stage: Stage, x: Tensor) -> None:
        if skip and x.ndim != 3:
            raise ValueError(f"the first tokens of {stage.name} are not known: its input is {tuple(x.shape)}")
        part = collect(x[:, skip:] if skip else x)
        found[stage.name] = found[stage.name] + part if stage.name in found else part

    _watch(model, blocks, tokens, see)
    return found


def output_errors(
    model: nn.Module,
    blocks: tuple[Block, ...],
    tokens: Int[Tensor, "n length"],
    arms: Mapping[str, Mapping[str, Quantizer]],
) -> dict[str, dict[str, OutputError]]:
    """The error of the outputs of each stage's sites together, by stage and arm.

    arms: by name, the quantizer of each stage's input. Stages are judged one at a time, on the inputs of the
    unquantized model. Tokens whose outputs are all zero do not count for `token`.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {}

    def see(stage: Stage, x: Tensor) -> None:
        weight = torch.cat([read_weight(model.get_submodule(site.name)) for site in stage.sites])
        for arm, quantizers in arms.items():
            if stage.name in quantizers:
                quantized = quantizers[stage.name](x)
                error = output_error(weight, x.flatten(0, -2), quantized.flatten(0, -2)).double()
                parts.setdefault(stage.name, {}).setdefault(arm, []).append(error)

    _watch(model, blocks, tokens, see)
    return {stage: {arm: _summary(torch.cat(of, 1)) for arm, of in found.items()} for stage, found in parts.items()}


def _summary(errors: Float[Tensor, "2 tokens"]) -> OutputError:
    wrong, whole = errors
    alive = whole > 0
    ratio = (wrong[alive] / whole[alive]).mean().item()
    return OutputError((wrong.sum() / whole.sum()).item(), ratio)


def adapt_tau(
    kurtosis: Float[Tensor, " sites"], squared: Float[Tensor, " sites"], divergence: Float[Tensor, " sites"]
) -> float:
    """The threshold at which `mixed` has the least geometric mean of the errors of these sites.

    squared, divergence: each site's error by either rule. Infinite where one rule is best everywhere: +inf for
    squared error always, -inf for divergence always. Between two sites, the middle. Raises ValueError where no site
    has errors above zero; others do not count.
    """
    kurtosis, squared, divergence = _alive(kurtosis, squared, divergence)
    order = kurtosis.double().argsort()
    sizes, gain = kurtosis.double()[order], (divergence.double() / squared.double()).log()[order]
    # Divergence for all sites from place k on: sites with equal kurtosis cannot be parted.
    costs = torch.cat([gain.flip(0).cumsum(0).flip(0), gain.new_zeros(1)])
    costs[1:-1][sizes[1:] == sizes[:-1]] = torch.inf
    place = int(costs.argmin())
    if place == 0:
        return -torch.inf
    return torch.inf if place == len(sizes) else ((sizes[place - 1] + sizes[place]) / 2).item()


@dataclass(frozen=True)
class Mixed:
    """The verdict on choosing by the tail, over sites.

    single:   the better of both rules used everywhere, by the geometric mean of the errors.
    gain, se: mean of ln(error of the mixed rule / error of `single`), below 0 where mixing helps, and its standard
              error over sites.
    share:    of sites with divergence. best: the gain of an oracle that knows the better rule of every site.
    p:        share of random choices of as many sites for divergence that do as well: the null of the tail's choice.
    """

    single: str
    gain: float
    se: float
    share: float
    best: float
    p: float


def judge_mixed(
    kurtosis: Float[Tensor, " sites"],
    squared: Float[Tensor, " sites"],
    divergence: Float[Tensor, " sites"],
    tau: float,
    permutations: int = 999,
    seed: int = 0,
) -> Mixed:
    """Does `divergence where the kurtosis reaches tau` beat the better single rule?

    Errors must be of tokens that neither a clip nor tau was chosen on. Raises ValueError where no site has errors above
    zero; others do not count.
    """
    kurtosis, squared, divergence = _alive(kurtosis, squared, divergence)
    logs = torch.stack([squared.double().log(), divergence.double().log()])
    heavy = kurtosis >= tau
    single = int(logs.mean(1).argmin())
    change = torch.where(heavy, logs[1], logs[0]) - logs[single]
    generator = torch.Generator().manual_seed(seed)
    reached = 0
    for _ in range(permutations):
        other = heavy[torch.randperm(len(heavy), generator=generator)]
        reached += bool(torch.where(other, logs[1], logs[0]).mean() <= (change + logs[single]).mean() + 1e-12)
    return Mixed(
        single=("squared", "divergence")[single],
        gain=change.mean().item(),
        se=(change.std() / len(change) ** 0.5).item() if len(change) > 1 else 0.0,
        share=heavy.double().mean().item(),
        best=(logs.amin(0) - logs[single]).mean().item(),
        p=(1 + reached) / (1 + permutations),
    )


def _alive(kurtosis: Tensor, *errors: Tensor) -> tuple[Tensor, ...]:
    """The sites whose errors have a logarithm: not those whose inputs, or whose outputs, are all zero."""
    alive = torch.stack([(error > 0) & error.isfinite() for error in errors]).all(0)
    if not alive.any():
        raise ValueError(f"none of {len(kurtosis)} sites has errors above zero")
    return tuple(given[alive] for given in (kurtosis, *errors))
