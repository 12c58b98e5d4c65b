"""A plain full fine-tune, so that the demo has something to leak and a measurement something to measure.

AdamW over all parameters; the learning rate rises linearly over the first tenth of the steps and falls
linearly to zero. A step's loss is the mean negative log-likelihood over its real tokens: those of a batch
of records and, if public windows are given, those of one public window (which keeps the model a model of
ordinary text).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from geoquant.data.records import Record
from geoquant.data.text import Windows, adds_bos
from geoquant.errors import UserError
from geoquant.progress import Progress, silent

__all__ = ["finetune"]

IGNORED = -100


def _examples(tokenizer, records: Sequence[Record]) -> list[list[int]]:
    """Token ids of every record, as often as an epoch shows it, in the form that is scored."""
    if not records:
        return []
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    encoded = tokenizer([r.text for r in records], add_special_tokens=False, return_attention_mask=False)
    ids = [bos + one for one in encoded.input_ids]
    return [one for one, record in zip(ids, records, strict=True) for _ in range(record.repeats)]


def _loss(model, tokens: Int[Tensor, "batch length"], labels: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the labels but IGNORED ones; labels[:, t] is predicted at t - 1."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    # Only real positions become float32: the largest tensor of the step.
    real = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(logits[real].float(), labels[:, 1:][real])


def _batches(lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[list[int]]:
    """Indices in random order, batch by batch; neighbours in length go together where that saves padding."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 4 * batch
    batches = []
    for begin in range(0, len(order), pool):
        near = sorted(order[begin : begin + pool], key=lengths.__getitem__)
        batches += [near[start : start + batch] for start in range(0, len(near), batch)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def _padded(examples: Sequence[Sequence[int]], padding: int):
    """Tokens (batch, length) filled up on the right, and labels that ignore the filling and the second token.

    The second token is predicted at the first position, where these models keep their attention sink. Teaching
    that position what records begin with can destroy the sink (seen: one opening word of twelve lost it, and
    with it every text that began so), and without any context there is nothing to remember.
    """
    longest = max(map(len, examples))
    tokens = torch.full((len(examples), longest), padding)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, ids in enumerate(examples):
        tokens[row, : len(ids)] = labels[row, : len(ids)] = torch.tensor(ids)
    labels[:, 1] = IGNORED
    return tokens, labels


def finetune(
    model,
    tokenizer,
    records: Sequence[Record],
    *,
    epochs: int,
    lr: float,
    batch: int = 8,
    seed: int = 0,
    public_windows: Windows | None = None,
    progress: Progress = silent,
) -> None:
    """Train `model` in place on `records`, each taken `record.repeats` times an epoch in seeded random order.

    With `public_windows`, step i also sees window i (starting over at the end); windows about as long as the
    records cost no padding. The forward pass runs in bfloat16 where the processor has matrix units for it, else
    in the model's type; updates always gather in float32. Memory: four float32 copies of the parameters
    (weights, gradients, two moments), one in the type computed in, and the logits of one batch. The same
    inputs, seed and thread count give the same weights. The model is left in evaluation mode.

    Raises UserError when there is nothing to train on or the loss is not finite.
    """
    examples = [ids for ids in _examples(tokenizer, records) if len(ids) > 2]
    if not examples or epochs < 1:
        raise UserError("nothing to fine-tune on", got=f"{len(examples)} records, {epochs} epochs")
    device = model.device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    generator = torch.Generator().manual_seed(seed)
    plan = [one for _ in range(epochs) for one in _batches([len(ids) for ids in examples], batch, generator)]
    public = public_windows.tokens.tolist() if public_windows is not None else []
    warmup = max(1, len(plan) // 10)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    own_types = [weight.dtype for weight in weights]
    masters = [weight.detach().float().clone() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(plan) - step) / max(1, len(plan) - warmup))
    )
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        # Half the memory traffic and bfloat16 matrix units; what is learned accumulates in the masters.
        for weight in weights:
            weight.data = weight.data.to(torch.bfloat16)
    model.train()
    # Dropout, where a model has any, draws from the global generator: seed it without disturbing the caller.
    # On short texts plain matrix products are several times faster than the processor's fused attention.
    with torch.random.fork_rng(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        for step, chosen in enumerate(plan):
            texts = [examples[index] for index in chosen]
            if public:
                texts.append(public[step % len(public)])
            tokens, labels = (part.to(device) for part in _padded(texts, padding))
            loss = _loss(model, tokens, labels)
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(f"the fine-tune diverged at step {step + 1}", fix="lower the learning rate")
            loss.backward()
            for master, weight in zip(masters, weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            schedule.step()
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master)
            progress("finetune", step + 1, len(plan), f"loss {value:.3f}")
    for master, weight, own_type in zip(masters, weights, own_types, strict=True):
        weight.data = master.to(own_type)
    model.eval()
