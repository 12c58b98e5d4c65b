"""Products with the Gauss-Newton matrix of a whole causal language model, which nobody could store.

    G = 1/N sum_t J_t^T H_t J_t,     H_t = diag(p_t) - p_t p_t^T

with J_t the Jacobian of the logits at scored position t and p_t the predicted distribution there: the Fisher
information of the weights under the model's own predictions, in nats per token and squared unit of the weights.
`delta^T G delta / 2` is the KL divergence in nats per token that a small change delta makes, to second order. One
product takes a forward-mode and a reverse-mode derivative (Schraudolph, Fast curvature matrix-vector products for
second-order gradient descent, Neural Computation 2002); no label is used.

`H_t = L_t L_t^T` with `L_t = diag(sqrt p_t) - p_t sqrt(p_t)^T`, so that `G = B^T B` with `B = L^T J / sqrt N`. Its
mirror image `B B^T` has the same eigenvalues above zero on vectors of one number per position and word: for a hundred
tokens and a hundred million weights the smaller of the two by far.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from geoquant.model.walk import site_modules

__all__ = ["GaussNewton"]


class GaussNewton:
    """The Gauss-Newton matrix of a model over some of its parameters on some windows of text, in float32.

    names: parameters as in `model.named_parameters()`; by default the weights of all sites. The first token of each
    window is context only, as in perplexity. chunk: windows that go through together. Vectors hold the parameters one
    after another in the order of `names`, each in its own layout (`parts` takes them apart).

    parameters: how many numbers a vector of weights has. outputs: how many a vector of the mirror image has.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "n length"],
        names: Sequence[str] | None = None,
        *,
        chunk: int = 1,
    ):
        if model.training:
            raise ValueError("the model draws at random in training mode: call model.eval() first")
        known = dict(model.named_parameters())
        self.names = tuple(names) if names is not None else tuple(f"{name}.weight" for name in site_modules(model))
        if absent := [name for name in self.names if name not in known]:
            raise ValueError(f"the model has no parameter {absent[0]!r}")
        self.model = model
        self.device = known[self.names[0]].device
        whole = {name: value.detach().float() for name, value in known.items()}
        whole |= {name: value.float() for name, value in model.named_buffers() if value.is_floating_point()}
        self.chosen = {name: whole.pop(name) for name in self.names}
        self.others = whole
        self.windows = tokens.to(self.device).split(chunk)
        self.positions = tokens.shape[0] * (tokens.shape[1] - 1)
        self.parameters = sum(value.numel() for value in self.chosen.values())
        self.outputs = self.positions * model.get_output_embeddings().weight.shape[0]

    def parts(self, vector: Float[Tensor, " parameters"]) -> dict[str, Tensor]:
        """The vector by parameter, each in its shape."""
        sizes = [value.numel() for value in self.chosen.values()]
        return {
            name: part.view_as(value)
            for (name, value), part in zip(self.chosen.items(), vector.split(sizes), strict=True)
        }

    def product(self, v: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
        """`G v`."""
        tangent, result = self.parts(v.float()), torch.zeros(self.parameters, device=self.device)
        for tokens in self.windows:
            logits, change = self._forward(tokens, tangent)
            p = logits.softmax(2)
            result += self._back(tokens, p * (change - (p * change).sum(2, keepdim=True)))
        return result / self.positions

    def mirrored(self, u: Float[Tensor, " outputs"]) -> Float[Tensor, " outputs"]:
        """`B B^T u`; numbers of u go by window, position and word."""
        tangent = self.parts(self.to_weights(u) / self.positions**0.5)
        rows = []
        for tokens in self.windows:
            logits, change = self._forward(tokens, tangent)
            p = logits.softmax(2)
            rows.append((p.sqrt() * (change - (p * change).sum(2, keepdim=True))).flatten())
        return torch.cat(rows)

    def to_weights(self, u: Float[Tensor, " outputs"]) -> Float[Tensor, " parameters"]:
        """`B^T u`: of an eigenvector of the mirror image, the eigenvector of G times the root of its eigenvalue."""
        result = torch.zeros(self.parameters, device=self.device)
        width = self.outputs // self.positions * (self.windows[0].shape[1] - 1)
        parts = u.float().split([len(tokens) * width for tokens in self.windows])
        for tokens, part in zip(self.windows, parts, strict=True):
            result += self._back(tokens, part, factor=True)
        return result / self.positions**0.5

    def _logits(self, tokens: Int[Tensor, "b length"], chosen: dict[str, Tensor]) -> Float[Tensor, "b scored words"]:
        call = {"input_ids": tokens, "use_cache": False}
        return functional_call(self.model, chosen | self.others, (), call).logits[:, :-1].float()

    def _forward(self, tokens: Int[Tensor, "b length"], tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits, and how they change along the tangent."""
        with torch.no_grad(), _differentiable(self.device):
            return jvp(lambda chosen: self._logits(tokens, chosen), (self.chosen,), (tangent,))

    def _back(self, tokens: Int[Tensor, "b length"], u: Tensor, factor: bool = False) -> Float[Tensor, " parameters"]:
        """`J^T u` summed over positions, or `J^T L u`."""
        with _differentiable(self.device):
            logits, pull = vjp(lambda chosen: self._logits(tokens, chosen), self.chosen)
            u = u.view_as(logits)
            if factor:
                p = logits.detach().softmax(2)
                root = p.sqrt()
                u = root * u - p * (root * u).sum(2, keepdim=True)
            (found,) = pull(u)
        return torch.cat([found[name].detach().flatten() for name in self.names])


@contextmanager
def _differentiable(device: torch.device):
    """Attention as plain products: its fused kernels have no forward-mode derivative."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False):
        yield
