"""What a run costs before it starts: floating-point operations, memory, time on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from geoquant.model.load import Loaded
from geoquant.model.vocabulary import repeated
from geoquant.model.walk import Block
from geoquant.observe.compute import compute_dtype
from geoquant.recipe import Recipe

__all__ = ["Cost", "cost", "gemm_rate"]

# Share of the GEMM rate that a whole run reaches (attention, norms and the scale search are not matrix products).
# Measured by benchmarks/figures.py; the estimate needs no better.
EFFICIENCY = 0.25


@dataclass(frozen=True)
class Cost:
    """Matrix-product operations by step, the machine's measured rates for them (per second), peak memory."""

    forward_flops: float
    moment_flops: float
    solve_flops: float
    compute_rate: float  # in the format of the forward passes
    float32_rate: float  # moments and solving
    memory_bytes: int

    @property
    def flops(self) -> float:
        return self.forward_flops + self.moment_flops + self.solve_flops

    @property
    def ideal_seconds(self) -> float:
        """Time if nothing but matrix products ran, each at the measured peak."""
        return self.forward_flops / self.compute_rate + (self.moment_flops + self.solve_flops) / self.float32_rate

    @property
    def seconds(self) -> float:
        """Expected time."""
        return self.ideal_seconds / EFFICIENCY

    def achieved(self, seconds: float) -> dict[str, float]:
        """The `solver` part of report.json: what share of the machine a run of that many seconds reached."""
        return {
            "flops": self.flops,
            "seconds": seconds,
            "gemm_peak_flops": self.flops / self.ideal_seconds,
            "share_of_peak": self.ideal_seconds / seconds,
        }


def gemm_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """Measured floating-point operations per second of a 2048-square matrix product."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    a @ a

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        wait()
        count += 1
    return 2 * 2048**3 * count / (time.perf_counter() - started)


def cost(loaded: Loaded, blocks: tuple[Block, ...], shape: tuple[int, int], recipe: Recipe) -> Cost:
    """Count the work of a run with these choices."""
    model, tokens, blocks = loaded.model, shape[0] * shape[1], repeated(blocks)
    weights = sum(stage.rows * stage.columns for block in blocks for stage in block.stages)
    once = 2 * weights * tokens
    # Per block: one pass over its stages, each starting where the last one stopped; a second one for the outputs
    # where they are not those of the observed weights.
    passes = 1 if recipe.sequential == "site" else 2
    outputs = recipe.reference_share if recipe.follows_drift else 0
    passes += outputs  # the full-precision model, beside the quantized one
    differentiated = recipe.gradient_share if recipe.metric == "gradient" else 0
    passes += 3 * differentiated  # forward, recomputation, backward to the inputs
    head = differentiated * model.get_output_embeddings().weight.numel()
    forward = once * passes + 4 * head * tokens
    stages = [stage for block in blocks for stage in block.stages]
    # Moments are symmetric and the drift is not; its target takes a few products of a solve each.
    moments = sum(2 * tokens * stage.columns**2 * (0.6 + outputs) for stage in stages)
    products = 1 + 12 * bool(outputs)
    solve = sum(products * stage.rows * stage.columns**2 + 10 * stage.columns**3 for stage in stages)
    largest = max(stages, key=lambda stage: stage.columns * (stage.rows + 6 * stage.columns))
    hidden = model.config.get_text_config().hidden_size
    stored = sum(parameter.nbytes for parameter in model.parameters())
    working = 4 * (3 * largest.rows * largest.columns + 12 * largest.columns**2) + 4 * 2 * tokens * hidden
    if outputs:
        working += 4 * (outputs * tokens * (hidden + largest.columns) + 4 * largest.columns**2)
    compute = compute_dtype(recipe.compute, model.device)
    runtime = 400 << 20  # Python, torch and transformers themselves
    return Cost(
        forward_flops=forward,
        moment_flops=moments,
        solve_flops=solve,
        compute_rate=gemm_rate(compute, model.device),
        float32_rate=gemm_rate(torch.float32, model.device),
        memory_bytes=int(stored + working + runtime),
    )
