"""A plain full fine-tune, so that the demo has something to leak and a measurement something to measure.

AdamW over all parameters; the learning rate rises linearly over the first tenth of the steps and falls
linearly to zero. A step's loss is the mean negative log-likelihood over its real tokens: those of a batch
of records and, if public windows are given, those of one public window (which keeps the model a model of
ordinary text).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoquant.data.records import Record
from geoquant.data.text import Windows, adds_bos
from geoquant.errors import UserError
from geoquant.progress import Progress, silent

__all__ = ["finetune"]

IGNORED = -100


def _examples(tokenizer, records: Sequence[Record]) -> list[list[int]]:
    """Token ids of every record, as often as an epoch shows it, in the form that is scored."""
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    encoded = tokenizer([r.text for r in records], add_special_tokens=False, return_attention_mask=False)
    ids = [bos + one for one in encoded.input_ids]
    return [one for one, record in zip(ids, records, strict=True) for _ in range(record.repeats)]


def _loss_sum(
    model, tokens: Int[Tensor, "batch length"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Summed negative log-likelihood of the labels but IGNORED ones; labels[:, t] is predicted at t - 1."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    # Only real positions become float32: the largest tensor of the step.
    real = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(logits[real].float(), labels[:, 1:][real], reduction="sum")


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

    With `public_windows`, step i also sees window i (starting over at the end). Memory: four float32 copies
    of the parameters (weights, gradients, two moments) and the logits of one batch. Where the processor
    multiplies bfloat16 matrices the forward pass runs in bfloat16; weights and moments stay float32. The
    same inputs, seed and thread count give the same weights. The model is left in evaluation mode.

    Raises UserError when there is nothing to train on or the loss is not finite.
    """
    examples = [ids for ids in _examples(tokenizer, records) if len(ids) > 1]
    if not examples or epochs < 1:
        raise UserError("nothing to fine-tune on", got=f"{len(examples)} records, {epochs} epochs")
    device = model.device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(examples) // batch)
    total = epochs * steps_per_epoch
    warmup = max(1, total // 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup))
    )
    fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    model.train()
    step = 0
    # Dropout, where a model has any, draws from the global generator: seed it without disturbing the caller.
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(examples), generator=generator).tolist()
            for begin in range(0, len(order), batch):
                chosen = [examples[index] for index in order[begin : begin + batch]]
                longest = max(map(len, chosen))
                tokens = torch.full((len(chosen), longest), padding)
                labels = torch.full((len(chosen), longest), IGNORED)
                for row, ids in enumerate(chosen):
                    tokens[row, : len(ids)] = labels[row, : len(ids)] = torch.tensor(ids)
                parts = [(tokens, labels)]
                if public_windows is not None and len(public_windows):
                    window = public_windows.tokens[step % len(public_windows)][None]
                    parts.append((window, window))
                count = sum(int((part[:, 1:] != IGNORED).sum()) for _, part in parts)
                value = 0.0
                for inputs, targets in parts:
                    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast):
                        loss = _loss_sum(model, inputs.to(device), targets.to(device)) / count
                    loss.backward()
                    value += loss.item()
                if not value < float("inf"):
                    raise UserError(
                        f"the fine-tune diverged at step {step + 1}", fix="lower the learning rate"
                    )
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                step += 1
                progress("finetune", step, total, f"loss {value:.3f}")
    model.eval()
