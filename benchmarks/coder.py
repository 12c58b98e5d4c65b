"""Which entropy coder: bits above the entropy and decoding speed, on rounded Gaussians and on a real coded model.

    pip install zstandard
    python benchmarks/coder.py [RUN]

Each line is one distribution of codes: constriction's ANS and range coder under the exact distribution, Zstandard on
bytes, and Zstandard on pairs of codes packed into bytes where they fit. With RUN (a finished lattice run) its coded
sites are decoded as the reader does, ROUNDS times, and the entropy of their codes is compared with what the file holds.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path

import constriction
import numpy as np

COUNT = 4_000_000
ROUNDS = 5  # the fastest counts
OWN = ("words", "escapes", "streams", "row_steps", "row_classes")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    arguments = parser.parse_args()
    coders = {
        "ANS": partial(coded, ans=True),
        "range coder": partial(coded, ans=False),
        "zstd": zstd,
        "zstd, pairs": pairs,
    }
    print("| spread | entropy | " + " | ".join(coders) + " |")
    print("|---" * (2 + len(coders)) + "|")
    rng = np.random.default_rng(0)
    for spread in (0.4, 0.7, 1.0, 2.0, 4.0, 8.0):
        values = np.rint(spread * rng.standard_normal(COUNT)).astype(np.int32)
        symbols = values - values.min()
        share = np.bincount(symbols) / COUNT
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
        cells = []
        for coder in coders.values():
            found = coder(symbols, share)
            cells.append(f"+{found[0] - entropy:.3f} bit, {found[1]:.0f} M/s" if found else "-")
        print(f"| {spread} | {entropy:.3f} | " + " | ".join(cells) + " |", flush=True)
    if arguments.run:
        print(real(arguments.run))


def timed(decode) -> tuple[float, object]:
    """Million codes a second, and what was decoded."""
    started = time.perf_counter()
    result = decode()
    return COUNT / (time.perf_counter() - started) / 1e6, result


def coded(symbols: np.ndarray, share: np.ndarray, *, ans: bool) -> tuple[float, float]:
    """Bits per code and speed of ANS or else of the range coder."""
    stream = constriction.stream
    model = stream.model.Categorical(share.astype(np.float32), perfect=False)
    coder = stream.stack.AnsCoder() if ans else stream.queue.RangeEncoder()
    (coder.encode_reverse if ans else coder.encode)(symbols, model)
    words = coder.get_compressed()
    decoder = stream.stack.AnsCoder if ans else stream.queue.RangeDecoder
    speed, back = timed(lambda: decoder(words).decode(model, COUNT))
    assert (back == symbols).all()
    return 8 * words.nbytes / COUNT, speed


def zstd(symbols: np.ndarray, share: np.ndarray) -> tuple[float, float] | None:
    """Zstandard, one code a byte; the smallest of a few levels."""
    if symbols.max() > 255:
        return None
    return packed(symbols.astype(np.uint8).tobytes())


def pairs(symbols: np.ndarray, share: np.ndarray) -> tuple[float, float] | None:
    """Zstandard, two codes a byte."""
    if symbols.max() > 15:
        return None
    return packed((16 * symbols[::2] + symbols[1::2]).astype(np.uint8).tobytes())


def packed(data: bytes) -> tuple[float, float]:
    """Bits per code and speed of Zstandard."""
    import zstandard

    smallest = min((zstandard.ZstdCompressor(level=level).compress(data) for level in (1, 3, 9)), key=len)
    speed, back = timed(lambda: zstandard.ZstdDecompressor().decompress(smallest))
    assert back == data
    return 8 * len(smallest) / COUNT, speed


def real(run: Path) -> str:
    """Decode every site of a run's coded model as the reader does."""
    import json
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from safetensors.torch import load_file

    from geoquant.export.matrices import decode
    from geoquant.export.native import REACHES, TABLES, read_tables, stored_matrix
    from geoquant.export.reader import TOGETHER, batches
    from geoquant.lattice.rate import code_bits, spread_of

    stored = {
        name: tensor
        for path in sorted((run / "coded").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    sites = json.loads((run / "coded" / "config.json").read_text())["quantization_config"]["sites"]
    tables = read_tables(stored[TABLES], stored[REACHES])
    lookup, held, entropy = tables.lookup(), 0, 0.0

    def decoded(names: list[str]) -> list[np.ndarray]:
        matrices = []
        for name in names:
            own = {label: stored[f"{name}.{label}"] for label in OWN}
            own |= {label: stored[f"{sites[name]['columns']}.{label}"] for label in ("column_steps", "column_classes")}
            matrices.append(stored_matrix(own, sites[name]))
        return decode(matrices, lookup)

    shared = batches({name: math.prod(entry["shape"]) for name, entry in sites.items()}, TOGETHER)
    decoded(list(sites)[:1])  # compiles
    seconds = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            parts = list(pool.map(decoded, shared))
        seconds = min(seconds, time.perf_counter() - started)
    found = {name: torch.from_numpy(codes) for names, part in zip(shared, parts) for name, codes in zip(names, part)}
    weights = sum(codes.numel() for codes in found.values())
    for name, codes in found.items():
        held += 8 * (stored[f"{name}.words"].nbytes + stored[f"{name}.escapes"].nbytes)
        entropy += code_bits(codes, spread_of(codes))
    threads = torch.get_num_threads()
    return (
        f"{weights / 1e6:.1f} M codes in {seconds:.2f} s ({weights / seconds / 1e6:.1f} M/s, {threads} threads); "
        f"{held / weights:.4f} bits per code in the file, {entropy / weights:.4f} is the entropy of each site's classes"
    )


if __name__ == "__main__":
    main()
