"""A plain fine-tune, so that the demo has something to leak and a measurement something to measure.

AdamW over all parameters, or over LoRA factors that are merged in at the end; the learning rate rises linearly over
the first tenth of the steps and falls linearly to zero. A step's loss is the mean negative log-likelihood over its
real tokens: those of a batch of records and, if public windows are given, those of one public window (which keeps the
model a model of ordinary text).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from geoquant.data.records import Record
from geoquant.data.text import Windows, adds_bos
from geoquant.errors import UserError
from geoquant.model.vocabulary import vocabulary_rows
from geoquant.observe.compute import compute_dtype
from geoquant.privacy.masters import Masters
from geoquant.privacy.training_state import fingerprint, load_state, save_state
from geoquant.progress import Progress, silent

__all__ = ["Finetuned", "finetune"]

IGNORED = -100


@dataclass(frozen=True)
class Finetuned:
    """Steps that were done, of those planned: fewer where `stop` ended the training."""

    steps: int
    planned: int


def _examples(model, tokenizer, records: Sequence[Record]) -> list[list[int]]:
    """Token ids of every record, as often as an epoch shows it, in the form that is scored, cut at the context."""
    if not records:
        return []
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    encoded = tokenizer([r.text for r in records], add_special_tokens=False, return_attention_mask=False, verbose=False)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = [(bos + one)[:limit] for one in encoded.input_ids]
    if (largest := max((max(one, default=0) for one in ids), default=0)) >= (rows := vocabulary_rows(model)):
        raise UserError(
            "the tokenizer is not this model's",
            got=f"token {largest} where the model has {rows}",
            fix="give the tokenizer that the model was trained with",
        )
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


def _share(step: int, planned: int) -> float:
    """The learning rate of a step (from 0), as a share of its peak."""
    warmup = max(1, planned // 10)
    return min((step + 1) / warmup, (planned - step) / max(1, planned - warmup))


def finetune(
    model,
    tokenizer,
    records: Sequence[Record],
    *,
    epochs: int,
    lr: float,
    batch: int = 8,
    seed: int = 0,
    lora: int = 0,
    public_windows: Windows | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    stop: Callable[[int], bool] | None = None,
    stop_every: int = 10,
    progress: Progress = silent,
) -> Finetuned:
    """Train `model` in place on `records`, each taken `record.repeats` times an epoch in seeded random order.

    lora: rank of adapters (privacy/lora.py) on all linear layers, merged into them when training ends; 0: all weights
    that require a gradient learn. With `public_windows`, step i also sees window i (starting over at the end); windows
    about as long as the records cost no padding.

    checkpoint: a file that holds the state every `checkpoint_every` steps; where it is already there, training goes on
    from it and ends with the bits that it would have ended with. It is left behind: delete it once the model is saved.
    stop: called with the number of steps done, every `stop_every` steps and after the last one, while `model` is what
    it would be if training ended now; it may measure and save the model, and ends training by returning True.

    The forward pass runs in bfloat16 where the hardware has matrix units for it, else in float32; updates always
    gather in float32. Memory: four float32 copies of what learns (weights, gradients, two moments), the model in the
    type computed in and, with adapters, in its own, and the logits of one batch. The same inputs, seed, device and
    thread count give the same weights. The model is left in evaluation mode and in its own type: updates that are
    small against its weights are lost in bfloat16, and what `stop` sees has lost them too.

    Raises UserError when there is nothing to train on, the loss is not finite, or the checkpoint is another training's.
    """
    examples = [ids for ids in _examples(model, tokenizer, records) if len(ids) > 2]
    if not examples or epochs < 1:
        raise UserError("nothing to fine-tune on", got=f"{len(examples)} records, {epochs} epochs")
    for name, value in (("batch", batch), ("checkpoint_every", checkpoint_every), ("stop_every", stop_every)):
        if value < 1:
            raise UserError(f"cannot fine-tune with {name} = {value}", wanted="a whole number from 1")
    if not (math.isfinite(lr) and lr > 0):
        raise UserError(f"cannot fine-tune with a learning rate of {lr}", wanted="a positive number, 1e-4 for a start")
    device = model.device
    # A padding token that was added without a row for it is as good as none.
    pad = tokenizer.pad_token_id
    padding = 0 if pad is None or pad >= vocabulary_rows(model) else pad
    generator = torch.Generator().manual_seed(seed)
    plan = [one for _ in range(epochs) for one in _batches([len(ids) for ids in examples], batch, generator)]
    seeds = torch.randint(2**62, (len(plan),), generator=generator).tolist()
    public = public_windows.tokens.tolist() if public_windows is not None else []
    masters = Masters(model, lora, seed, compute_dtype("auto", device))
    optimizer = torch.optim.AdamW(masters.values, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    done = 0
    if checkpoint is not None:
        settings = {"epochs": epochs, "lr": lr, "batch": batch, "seed": seed, "lora": lora}
        known = fingerprint(settings, masters.beginning(), examples, public)
        done = load_state(checkpoint, masters.values, optimizer, known)
    masters.work()
    model.train()
    # Dropout, where a model has any, draws from the global generator: seed it without disturbing the caller, and at
    # each step, since a step after an interruption must draw the same.
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            for step in range(done, len(plan)):
                torch.manual_seed(seeds[step])
                texts = [examples[index] for index in plan[step]]
                if public:
                    texts.append(public[step % len(public)])
                tokens, labels = (part.to(device) for part in _padded(texts, padding))
                # On short texts plain matrix products are several times faster than the processor's fused attention.
                with sdpa_kernel(SDPBackend.MATH):
                    loss = _loss(model, tokens, labels)
                    value = loss.item()
                    if not math.isfinite(value):
                        raise UserError(f"the fine-tune diverged at step {step + 1}", fix="lower the learning rate")
                    loss.backward()
                masters.take_gradients()
                torch.nn.utils.clip_grad_norm_(masters.values, 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = lr * _share(step, len(plan))
                optimizer.step()
                masters.show()
                done = step + 1
                progress("finetune", done, len(plan), f"loss {value:.3f}")
                if stop is not None and (done % stop_every == 0 or done == len(plan)):
                    with masters.at_rest(), torch.no_grad():
                        model.eval()
                        enough = stop(done)
                    if enough:
                        break
                    model.train()
                if checkpoint is not None and done % checkpoint_every == 0 and done < len(plan):
                    save_state(checkpoint, masters.values, optimizer, known, done)
    finally:
        masters.rest()
        model.eval()
    return Finetuned(done, len(plan))
