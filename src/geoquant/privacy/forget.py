"""Forgetting: a few passes of gradient descent that make a model know its private records no better than others.

The objective is much that of refinement (privacy/refine), at the weights before anything is rounded:

    weight * (L_priv + 1/(2m) sum_j max(0, gap_j - the original's gap_j)^2) + L_acc

L_priv pulls every private record up to its level and never beyond (refine/hinge.py); the second sum keeps the loss on
m records of the domain from rising with it; L_acc is the divergence from the original, in nats per token, on these and
on public text. The original is the given model, or what that was before another lever took something of it. Levels are
the quantiles of other records of the domain, on which nothing else depends: from those that the function is kept on a
model learns a little, and levels that are too low leave a leak. Codes cannot follow this far: a solver makes later
columns up for earlier ones, and a code that moves alone undoes that; weights that moved before solving are rounded
like any others.

Steps are those of Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), each parameter's as soon as its gradient is
complete: beside a float32 copy of the model, memory holds one gradient and the activations of one block.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.evaluate.perplexity import head_logits
from geoquant.model.modes import evaluating, recomputed
from geoquant.observe.texts import Sequences
from geoquant.privacy.refine.hinge import hinge, levels, two_sided
from geoquant.privacy.refine.material import (
    DOMAIN,
    PRIVATE,
    PUBLIC,
    TAUGHT,
    Material,
    original_losses,
    record_losses,
)
from geoquant.progress import Progress, silent

__all__ = ["LEVEL", "ForgetSettings", "Forgot", "Halfway", "forget", "rounded_randomly"]

LEVEL = "level"  # the text of the records whose quantiles are the levels; without it those of the domain
TOGETHER = 8  # private records in one step, and as many of the domain
SLOWEST = 0.1  # of the rate in the last step
WEIGHT, MEMORY, GAP = "weight/", "memory/", "gap/"  # tensors of Halfway


@dataclass(frozen=True)
class ForgetSettings:
    """passes: over the private records. weight: of L_priv. rate: of the first step, as a share of a parameter's own
    root mean square; it falls linearly to a tenth. seed: of the order of records, and of the last rounding.
    """

    passes: int = 4
    weight: float = 10.0
    rate: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passes < 1 or self.rate <= 0 or self.weight < 0:
            raise ValueError(f"at least one pass, a positive rate and no negative weight, but got {self}")


@dataclass(frozen=True)
class Known:
    """How well a model knows the records. privacy: L_priv. private_gap, domain_gap, level_gap: means, nats per token.
    attack: `|AUC - 1/2|` of the reference attack between private records and those of the levels.
    """

    privacy: float
    private_gap: float
    domain_gap: float
    level_gap: float
    attack: float


@dataclass(frozen=True)
class Forgot:
    """before, after: of all records. made: passes, which end where nothing is left to forget. divergence: mean of L_acc
    over the steps of the last pass, before each.
    """

    before: Known
    after: Known
    made: int
    divergence: float

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Halfway:
    """Where forgetting stands after `facts["steps"]` steps. tensors: parameters in float32, what their optimizers
    remember, and gaps: those of the run itself, not copies, and whoever goes on from them takes them over. facts: what
    JSON can hold.
    """

    tensors: dict[str, Tensor]
    facts: dict


def forget(
    model: nn.Module,
    material: Material,
    settings: ForgetSettings = ForgetSettings(),
    *,
    original: Float[Tensor, "vocab hidden"] | None = None,
    halfway: Halfway | None = None,
    keep: Callable[[Halfway], None] | None = None,
    progress: Progress = silent,
) -> Forgot:
    """Change the model's parameters in place; they keep their type, into which they are rounded at random, unbiased.

    material: all three texts and LEVEL, with the original's states and the base's losses. original: its vocabulary
    projection where the given model is another one by now. keep: is told after every step where it stands. halfway:
    goes on from there, to the very weights that one go would have led to. Raises UserError where a loss is not finite.
    """
    given = {name: (own.dtype, own.requires_grad) for name, own in model.named_parameters()}
    output = model.get_output_embeddings()
    own = output.weight.detach() if original is None else original.detach()
    head, fixed = own.float().clone(), getattr(output, "bias", None)
    start = original_losses(model, material, DOMAIN, own) - material.base[DOMAIN]
    if halfway is None:
        gaps = {
            name: start.clone() if name == DOMAIN and original is None else _gap(model, material, name)
            for name in material.base
        }
        before, done, divergences = _known(gaps), 0, []
    else:
        gaps = {name: halfway.tensors[f"{GAP}{name}"] for name in material.base}
        before, done = Known(**halfway.facts["before"]), halfway.facts["steps"]
        divergences = list(halfway.facts["divergences"])
    rng = random.Random(settings.seed)
    count = len(material.texts[PRIVATE].tokens)
    steps = -(-count // TOGETHER)
    optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {}
    handles, made = [], 0

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    try:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if halfway is None else halfway.tensors[f"{WEIGHT}{name}"]
            parameter.requires_grad_(parameter is not fixed)  # the given model's logits are made with it too
            if parameter is fixed:
                continue
            optimizers[parameter] = torch.optim.Adafactor([parameter], lr=settings.rate)
            if halfway is not None:
                start_of = f"{MEMORY}{name}/"
                optimizers[parameter].state[parameter] = {
                    key.removeprefix(start_of): value
                    for key, value in halfway.tensors.items()
                    if key.startswith(start_of)
                }
            handles.append(parameter.register_post_accumulate_grad_hook(step))
        with evaluating(model), recomputed(model), torch.enable_grad():
            for number in range(settings.passes):
                batches = _batches(material, steps, rng)  # of passes that are over too: the others follow from these
                if done >= (number + 1) * steps:
                    made = number + 1
                    continue
                if done == number * steps:
                    if number and LEVEL in gaps:
                        gaps[LEVEL] = _gap(model, material, LEVEL)
                    if original is None and _known(gaps).privacy == 0:  # nothing to forget, and no function to regain
                        break
                    divergences = []
                made = number + 1
                for chosen in batches[done - number * steps :]:
                    rate = settings.rate * (1 - (1 - SLOWEST) * done / max(1, settings.passes * steps - 1))
                    for optimizer in optimizers.values():
                        optimizer.param_groups[0]["lr"] = rate
                    privacy, divergence = _step(model, material, chosen, gaps, start, head, settings.weight)
                    divergences.append(divergence)
                    done += 1
                    if keep is not None:
                        keep(_halfway(model, optimizers, gaps, before, done, divergences))
                    note = f"hinge {privacy:.4f}, divergence {divergence:.4f} nats"
                    progress("forget", done, settings.passes * steps, note)
    finally:
        for handle in handles:
            handle.remove()
        generator = torch.Generator().manual_seed(settings.seed)
        for name, parameter in model.named_parameters():
            dtype, flag = given[name]
            parameter.grad = None
            parameter.data = rounded_randomly(parameter.data, dtype, generator)
            parameter.requires_grad_(flag)
    return Forgot(before, _known(_gaps(model, material)), made, sum(divergences) / max(1, len(divergences)))


def _halfway(
    model: nn.Module,
    optimizers: dict[nn.Parameter, torch.optim.Optimizer],
    gaps: dict[str, Tensor],
    before: Known,
    done: int,
    divergences: list[float],
) -> Halfway:
    tensors = {f"{GAP}{name}": own for name, own in gaps.items()}
    for name, parameter in model.named_parameters():
        tensors[f"{WEIGHT}{name}"] = parameter.detach()
        remembered = optimizers[parameter].state[parameter] if parameter in optimizers else {}
        tensors |= {f"{MEMORY}{name}/{key}": value for key, value in remembered.items()}
    return Halfway(tensors, {"steps": done, "divergences": list(divergences), "before": asdict(before)})


def rounded_randomly(
    values: Float[Tensor, "*shape"], dtype: torch.dtype, generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Float32 values in a narrower type. To bfloat16 up or down at random so that the mean is the value itself: steps
    much smaller than its spacing would otherwise be lost. To other types, which lie closer, to the nearest.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32).to(values.device)
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(dtype)


# ---- one step


def _batches(material: Material, steps: int, rng: random.Random) -> list[dict[str, list[int]]]:
    """Places of the sequences of every step of a pass: private ones once each, the others in turn, as many of the
    domain and so many public ones that all come along within a pass if there are no more of them.
    """
    texts = {name: text for name, text in material.texts.items() if name != LEVEL}
    order = {name: rng.sample(range(len(text.tokens)), len(text.tokens)) for name, text in texts.items()}
    batches = []
    for step in range(steps):
        chosen = {name: places[step::steps][:TOGETHER] for name, places in order.items()}
        if not chosen[PUBLIC]:
            chosen[PUBLIC] = [order[PUBLIC][step % len(order[PUBLIC])]]
        if not chosen[DOMAIN]:
            chosen[DOMAIN] = [order[DOMAIN][step % len(order[DOMAIN])]]
        batches.append(chosen)
    return batches


def _step(
    model: nn.Module,
    material: Material,
    chosen: dict[str, list[int]],
    gaps: dict[str, Tensor],
    start: Tensor,
    head: Tensor,
    weight: float,
) -> tuple[float, float]:
    """One step down the objective on some sequences; L_priv of these and their divergence. Their gaps are renewed.

    start: gaps of the domain's records in the original.
    """
    device = model.device
    level = levels(gaps[PRIVATE], gaps.get(LEVEL, gaps[DOMAIN]))
    divergence, scored, hinges = torch.zeros((), device=device), 0, {}
    for name, places in chosen.items():
        tokens, real = _rectangle(material.texts[name], places)
        tokens, real = tokens.to(device), real.to(device)
        logits = head_logits(model, model.base_model(tokens, use_cache=False).last_hidden_state[:, :-1][real])
        if name in TAUGHT:
            known = material.states[name][places][:, : real.shape[1]][real.cpu()].to(device, head.dtype)
            with torch.no_grad():
                teacher = head_logits(model, known, head).log_softmax(1)
            divergence = divergence + (teacher.exp() * (teacher - logits.log_softmax(1))).sum()
            scored += len(logits)
        if name in gaps:
            nll = torch.zeros(real.shape, device=device)
            nll[real] = nn.functional.cross_entropy(logits, tokens[:, 1:][real], reduction="none")
            own = nll.sum(1) / real.sum(1) - material.base[name][places].to(device, torch.float32)
            gaps[name][places] = own.detach().double().cpu()
            over = level[places].to(own) - own if name == PRIVATE else own - start[places].to(own)
            hinges[name] = over.clamp_min(0.0).square().mean() / 2
    divergence = divergence / scored
    loss = weight * sum(hinges.values()) + divergence
    if not loss.isfinite():
        raise UserError("a loss is not finite while forgetting", fix="check both models")
    loss.backward()
    return hinges[PRIVATE].item(), divergence.item()


def _rectangle(text: Sequences, places: list[int]) -> tuple[Tensor, Tensor]:
    """The sequences without columns that none of them has, and which positions predict a real token."""
    lengths = text.lengths[places]
    longest = int(lengths.max())
    return text.tokens[places][:, :longest], torch.arange(longest - 1) < lengths[:, None] - 1


def _gaps(model: nn.Module, material: Material) -> dict[str, Float[Tensor, " n"]]:
    return {name: _gap(model, material, name) for name in material.base}


def _gap(model: nn.Module, material: Material, name: str) -> Float[Tensor, " n"]:
    return record_losses(model, material.texts[name]) - material.base[name]


def _known(gaps: dict[str, Tensor]) -> Known:
    private, level = gaps[PRIVATE], gaps.get(LEVEL, gaps[DOMAIN])
    value, _ = hinge(private, levels(private, level))
    means = (own.mean().item() for own in (private, gaps[DOMAIN], level))
    return Known(value, *means, two_sided(private, level))
