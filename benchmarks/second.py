"""A second family of models for the figures that SmolLM2 (Llama) gave first: trained here, in a quarter of an hour.

    python benchmarks/second.py OUT        # a killed run goes on by the same command

A GPT-NeoX of 3.8 million parameters: LayerNorm with biases, one fused query-key-value matrix, attention and a GELU MLP
side by side, rotary angles on a quarter of each head, biases in every linear map, no weights tied. It learns byte pairs
of its own (4,096) and its text from what every Python carries: the language reference but its first and last tenth, and
the sources of the standard library. The two tenths are what `geoquant analyze` and `geoquant bench geometry` read: the
model never saw them. Then it is taught invented medical records and planted canaries, with a window of the reference at
each step, until the reference attack reaches the regime `strong`.

OUT/base and OUT/strong are ordinary Hugging Face folders; OUT/records holds the sides of the split.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from geoquant.cli.screen import Lines
from geoquant.data.folder import write_folder
from geoquant.data.stdlib import library_files
from geoquant.data.synthetic import synthetic_records
from geoquant.data.text import builtin_text, windows
from geoquant.evaluate.perplexity import perplexity
from geoquant.export.dense import export_dense
from geoquant.finetuning import REGIMES, teach_regimes
from geoquant.model.load import load
from geoquant.privacy.training_state import fingerprint, load_state, save_state
from geoquant.runs import atomic_directory, write_json

VOCABULARY, LENGTH, END = 4096, 256, "<|endoftext|>"
REFERENCE_EPOCHS = 4  # the sources are read in part
STEPS, BATCH, PEAK = 1100, 4, 2e-3
TAUGHT = {"epochs": 60, "lr": 5e-4, "batch": 8, "check_every": 8, "checkpoint_every": 50, "most": 60}


def main() -> None:
    """Train, teach, and say how well both went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer for a try")
    options = parser.parse_args()
    base, records = options.out / "base", options.out / "records"
    first, middle, last = reference()
    if not base.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        train(options.out, first, middle, last, options.steps)
    made = synthetic_records("medical", 250, seed=0, canaries=32, repeats=(1, 4))
    if not records.exists():
        write_folder(made, records)
    loaded = load(str(base))
    statements = teach_regimes(
        loaded,
        (*made.members, *made.split.canaries),
        made.members,
        made.nonmembers,
        options.out,
        public_windows=windows(loaded.tokenizer, middle, length=LENGTH // 2),  # about as long as a record
        regimes=[regime for regime in REGIMES if regime.name == "strong"],
        progress=Lines(sys.stderr),
        **TAUGHT,
    )
    for name, statement in statements.items():
        taught = load(str(options.out / name))
        print(f"{name}: {statement['steps']} steps, attack {statement['attack']}")
        print(f"  loss on the last tenth {held_out(taught.model, taught.tokenizer, last):.3f} nats a token")


def reference() -> tuple[str, str, str]:
    """The language reference in three: its first tenth, what is learned, its last tenth."""
    text = builtin_text()
    tenth = len(text) // 10
    return text[:tenth], text[tenth:-tenth], text[-tenth:]


def sources() -> str:
    """The sources of the standard library, one after the other."""
    found = library_files(Path(sysconfig.get_path("stdlib")))
    return "\n\n".join(path.read_text(encoding="utf-8", errors="ignore") for _, path in found)


def byte_pairs(texts: list[str]):
    """A tokenizer of its own: byte pairs, digits one by one, learned from what the model learns from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def untrained():
    """The architecture, from a fixed seed."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=5,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return GPTNeoXForCausalLM(config)


def train(out: Path, first: str, middle: str, last: str, steps: int) -> None:
    """Write OUT/base: AdamW, the rate rising over a twentieth of the steps and falling to zero by a cosine."""
    code = sources()
    tokenizer = byte_pairs([middle, code[: 2 * len(middle)]])
    prose, code = (windows(tokenizer, text, length=LENGTH).tokens for text in (middle, code))
    generator = torch.Generator().manual_seed(0)
    wanted = max(0, steps * BATCH - REFERENCE_EPOCHS * len(prose))
    code = code[torch.randperm(len(code), generator=generator)[:wanted]]
    plan = torch.cat([prose] * REFERENCE_EPOCHS + [code])
    plan = plan[torch.randperm(len(plan), generator=generator)][: steps * BATCH].view(-1, BATCH, LENGTH)
    model = untrained().train()
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    known = fingerprint({"steps": steps, "batch": BATCH, "lr": PEAK}, weights, plan[0].tolist(), plan[-1].tolist())
    state, started = out / "training.safetensors", time.perf_counter()
    with torch.no_grad():
        done = load_state(state, weights, optimizer, known)
    print(f"{sum(w.numel() for w in weights):,} parameters, {plan.numel():,} tokens, {done} steps done", flush=True)
    for step, tokens in list(enumerate(plan))[done:]:
        share = step / len(plan)
        rate = PEAK * min((step + 1) / (len(plan) / 20), 0.5 + 0.5 * torch.cos(torch.tensor(share * torch.pi)).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            save_state(state, weights, optimizer, known, step + 1)
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    with atomic_directory(out / "base") as folder:
        export_dense(model, tokenizer, folder)
        found = {
            "unigram": unigram(prose, windows(tokenizer, last, length=LENGTH).tokens),
            "first tenth": held_out(model, tokenizer, first),
            "last tenth": held_out(model, tokenizer, last),
            "steps": len(plan),
            "parameters": sum(w.numel() for w in weights),
        }
        write_json(folder / "training.json", found)
    print(found)
    state.unlink()


def held_out(model, tokenizer, text: str) -> float:
    """Nats a token on all windows of a text."""
    return perplexity(model, windows(tokenizer, text, length=LENGTH)).nll


def unigram(seen: torch.Tensor, held: torch.Tensor) -> float:
    """Nats a token of whoever knows how often each token occurs in what was learned (and adds one to each count)."""
    counts = torch.bincount(seen.flatten(), minlength=VOCABULARY) + 1.0
    return -(counts / counts.sum()).log()[held[:, 1:]].mean().item()


if __name__ == "__main__":
    main()
