"""How long does an audit take, and what in it?

    python benchmarks/audit_speed.py MODEL [--records 200] [--tokens 64]

Cuts made records to so many tokens each (half members, half non-members), scores them for all attacks that need one
model, and prints wall and CPU seconds of each part, and of the attacks themselves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from geoquant.auditing import attack
from geoquant.data.private import make_records
from geoquant.data.records import Record, Split
from geoquant.model.load import load
from geoquant.privacy import scoring


def cut(tokenizer, count: int, tokens: int) -> list[Record]:
    """Records of about so many tokens: made ones, put one after another."""
    pool = make_records(3 * count, 3)
    texts = [" ".join(record.text for record in pool[3 * i : 3 * i + 3]) for i in range(count)]
    return [Record(tokenizer.decode(tokenizer(text).input_ids[:tokens])) for text in texts]


def timed(name: str, work: Callable[[], object]) -> object:
    """The result of `work`; its seconds are printed."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    print(f"| {name} | {time.perf_counter() - wall:.1f} | {time.process_time() - cpu:.1f} |", flush=True)
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    loaded = load(options.model)
    records = cut(loaded.tokenizer, options.records, options.tokens)
    split = Split(tuple(records[::2]), tuple(records[1::2]))
    print(f"{len(records)} records of {options.tokens} tokens, {torch.get_num_threads()} threads\n")
    print("| part | wall s | CPU s |\n|---|---|---|")
    started = time.perf_counter()
    timed("texts as written", lambda: scoring.score_records(loaded.model, loaded.tokenizer, records))
    scores = timed(
        "all texts that the attacks need", lambda: scoring.score_split(loaded.model, loaded.tokenizer, split)
    )
    timed("attacks, gate, near-duplicates, intervals", lambda: attack(split, {"original": scores}, 0))
    print(f"| together, the first counted twice | {time.perf_counter() - started:.1f} | |")


if __name__ == "__main__":
    main()
