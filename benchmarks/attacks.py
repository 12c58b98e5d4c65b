"""Membership and extraction attacks side by side on a fine-tune of SmolLM2-135M that is made here.

    python benchmarks/attacks.py --out FOLDER [--epochs 7] [--rate 5e-4] [--code] [--neighbours 4]

Prints the AUC and TPR of each attack with CPU seconds, then what greedy decoding writes: marked spans behind their true
prefix, the same behind an attacker's prompts, and whole suffixes. --code: pieces of the standard library, split by
file, instead of the demo's records. --neighbours: also attacks with so many texts a record in which tokens were
replaced, each scored in full (see `swapped`).
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from geoquant.data.private import DEMO, demo_split
from geoquant.data.records import Record, Split
from geoquant.data.stdlib import stdlib_records
from geoquant.demo import FINETUNED, teach
from geoquant.evaluate.perplexity import final_hidden, head_logits
from geoquant.model.load import load
from geoquant.privacy.attacks import ATTACKS
from geoquant.privacy.delong import delong_interval
from geoquant.privacy.evidence import gather
from geoquant.privacy.extraction import extraction
from geoquant.privacy.prompts import make_prompts, prompted, prompted_extraction
from geoquant.privacy.scores import RecordScores
from geoquant.privacy.scoring import score_records
from geoquant.privacy.statistics import auc, tpr_at_fpr
from geoquant.privacy.suffixes import suffix_extraction
from geoquant.progress import silent

SWAPPED = 0.25  # share of the tokens of each neighbour
TOP = 20  # likeliest other tokens, one of which takes a token's place
TOKENS = 2048  # in a batch


def timed(what: str, do, *arguments):
    """The result of `do`, its CPU seconds printed."""
    begin = time.process_time()
    result = do(*arguments)
    print(f"{what}: {time.process_time() - begin:.0f} CPU s", flush=True)
    return result


@torch.no_grad()
def swapped(model, tokenizer, texts: list[str], count: int, seed: int = 0) -> np.ndarray:
    """(n, count) mean log-probability of neighbours: SWAPPED of a text's tokens replaced, at places that its neighbours
    divide among them as far as they go, by tokens drawn from the model's own distribution there without the true one.
    """
    values = np.empty((len(texts), count))
    for row, text in enumerate(texts):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        rng = np.random.default_rng([seed, row])
        logits = torch.log_softmax(head_logits(model, final_hidden(model, ids[None])[0, :-1]), 1)
        others, tokens = logits.scatter(1, ids[1:, None], -torch.inf).topk(TOP)
        others = torch.softmax(others, 1).double().numpy()
        places, batch = rng.permutation(len(ids) - 1), ids.repeat(count, 1)
        each = max(1, round(SWAPPED * len(places)))
        for number in range(count):
            for place in np.take(places, range(number * each, (number + 1) * each), mode="wrap"):
                drawn = rng.choice(TOP, p=others[place] / others[place].sum())
                batch[number, place + 1] = tokens[place, drawn]
        hidden = final_hidden(model, batch)[:, :-1]
        found = torch.log_softmax(head_logits(model, hidden.flatten(0, 1)), 1).view(count, len(places), -1)
        values[row] = found.gather(2, batch[:, 1:, None])[..., 0].mean(1).numpy()
    return values


def separate(name: str, sides: tuple[np.ndarray, np.ndarray]) -> None:
    """One line of the table of attacks."""
    low, high = delong_interval(*sides)
    caught = tpr_at_fpr(*sides, 0.1)[0]
    print(f"| {name} | {auc(*sides):.3f} | {low:.3f} to {high:.3f} | {100 * caught:.0f}% |", flush=True)


def write_out(title: str, results) -> None:
    """One line for each kind: extracted by greedy decoding and in 10,000 samples, members and control."""
    for part in results:
        low, high = part.ci
        cells = f"{part.extracted} of {part.spans} | {100 * low:.0f} to {100 * high:.0f}% | {part.sampled['10000']}"
        control = f"{part.control_extracted} of {part.control_spans} | {part.control_sampled['10000']}"
        print(f"| {title} | {part.kind} | {cells} | {control} |", flush=True)


def report(folder: Path, split: Split, neighbours: int) -> None:
    """All tables for one fine-tune."""
    sides = split.members, split.nonmembers
    own = load(str(folder / "base"))

    def score(records) -> RecordScores:
        return score_records(own.model, own.tokenizer, records, batch_tokens=TOKENS)

    reference = [timed("base", score, side) for side in sides]
    own = load(str(folder / FINETUNED))
    target = [timed("scores", score, side) for side in sides]
    lowered = [score([Record(record.text.lower()) for record in side]) for side in sides]
    evidence = [gather(*parts) for parts in zip(sides, target, reference, lowered, strict=True)]
    print("\n| attack | AUC | interval | TPR at 10% FPR |\n|---|---|---|---|")
    for name, attack in ATTACKS.items():
        separate(name, tuple(attack.score(side) for side in evidence))
    if neighbours:
        texts = [r.text for side in sides for r in side]
        print()
        around = timed("neighbours", swapped, own.model, own.tokenizer, texts, neighbours)
        means = np.concatenate([ATTACKS["loss"].score(side) for side in evidence])
        for count in range(1, neighbours + 1):
            gain = means - around[:, :count].mean(1)
            separate(f"{count} neighbours", (gain[: len(sides[0])], gain[len(sides[0]) :]))
    prompts = [make_prompts(side) for side in sides]
    answers = None
    if all(prompts):
        print()
        answers = [timed("prompts", score, [one.record for one in side]) for side in prompts]
    print("\n| given | what | members | interval | in 10,000 | control | in 10,000 |\n|---|---|---|---|---|---|---|")
    write_out("true prefix", extraction(*target, *sides))
    if answers:
        write_out("prompts", prompted_extraction(*answers, *prompts))
    for row in suffix_extraction(*target):
        write_out(f"{row.prefix} tokens", [replace(row.found, kind=f"the next {row.tokens:.0f}")])
    if answers:
        best = Counter(_form(one, sides[0]) for one, tried in prompted(answers[0], prompts[0]) if tried.extracted)
        print("\nbest prompts:", "; ".join(f"{form} ({count})" for form, count in best.most_common()))


def _form(prompt, records) -> str:
    """The prompt with NAME in place of the name."""
    (span,) = prompt.record.fields
    own = records[prompt.source]
    name = next(own.value(field) for field in own.fields if field.kind == "name")
    return repr(prompt.record.text[: span.start].replace(name, "NAME"))


def main() -> None:
    """Make the fine-tune where it is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=DEMO.epochs)
    parser.add_argument("--rate", type=float, default=DEMO.learning_rate)
    parser.add_argument("--code", action="store_true")
    parser.add_argument("--neighbours", type=int, default=0)
    arguments = parser.parse_args()
    settings = replace(DEMO, epochs=arguments.epochs, learning_rate=arguments.rate)
    split = stdlib_records(280, 3, characters=240).split if arguments.code else demo_split(settings)
    if not (arguments.out / FINETUNED).exists():
        timed("fine-tune", teach, arguments.out, split, settings, silent)
    report(arguments.out, split, arguments.neighbours)


if __name__ == "__main__":
    main()
