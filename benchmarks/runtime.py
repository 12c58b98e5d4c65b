"""What a lattice run takes in memory and how fast it multiplies: bf16, int8 codes, and nibbles with a sparse list.

    python benchmarks/runtime.py sizes RUN...
    OMP_NUM_THREADS=1 python benchmarks/runtime.py layers RUN
    OMP_NUM_THREADS=1 python benchmarks/runtime.py decode RUN

RUN is a finished run with the format `geoquant`. `layers` takes the layers of one block and a matrix of 4096 x 4096
codes drawn from all codes of the run, in as many copies as fill CACHE bytes at 16 bits, so that weights come from
memory as they do while a model writes; forms take turns, and the fastest of their rounds counts. `decode` lets whole
models write, the original in bf16 among them. Ratios are to bf16: above 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import geoquant  # noqa: F401 (lets transformers read the format)
from geoquant.export.int4 import PackedMatrix
from geoquant.export.packed import Packed, pack
from geoquant.export.reader import Coded, CodedLinear

CACHE = 256 << 20
ROUNDS = 15
TOKENS = (1, 8, 128)
LAYERS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("sizes", "layers", "decode"))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.table == "sizes":
        lines = sizes(arguments.runs)
    elif arguments.table == "layers":
        lines = layers(arguments.runs[0])
    else:
        lines = decode(arguments.runs[0], arguments.new_tokens)
    for line in lines:
        print(line, flush=True)


def read(run: Path, runtime: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The coded model of a run."""
    config = AutoConfig.from_pretrained(run / "coded")
    config.quantization_config["runtime"] = runtime
    return AutoModelForCausalLM.from_pretrained(run / "coded", config=config, dtype=dtype).eval()


# --- sizes --------------------------------------------------------------------------------------------------


def sizes(runs: list[Path]) -> Iterator[str]:
    """Bytes of all coded matrices, in millions, linear layers and embeddings apart."""
    yield "| run | part | bf16 | int8 | int4 | file | codes beyond 4 bits | weights at 8 bits or more |"
    yield "|---" * 8 + "|"
    for run in runs:
        today = {name: module for name, module in read(run, "int8").named_modules() if isinstance(module, Coded)}
        int8 = {name: sum(buffer.nbytes for buffer in module.buffers()) for name, module in today.items()}
        stored = file_bytes(run, today)
        del today
        forms = {
            name: module.matrix
            for name, module in read(run, "int4").named_modules()
            if isinstance(module, PackedMatrix)
        }
        rates = {
            site["name"]: site["bits_per_weight"] for site in json.loads((run / "report.json").read_text())["sites"]
        }
        narrow = [rates[name] for name, form in forms.items() if form.width == 4]
        wide = [rates[name] for name, form in forms.items() if form.width > 4]
        embedding = {name for name in forms if "embed" in name or "head" in name}
        for part, names in (("linear layers", forms.keys() - embedding), ("embedding", embedding)):
            if names:
                yield row(
                    run.name, part, [forms[name] for name in names], *(sum(d[n] for n in names) for d in (int8, stored))
                )
        span = f"{run.name}: 4 bits for matrices of {min(narrow):.2f} to {max(narrow):.2f} bits per weight"
        yield span + (f", 8 or more for those of {min(wide):.2f} to {max(wide):.2f}" if wide else "")


def row(run: str, part: str, forms: list[Packed], int8: int, stored: int) -> str:
    """One line of the table."""
    weights = sum(len(form.dense) * form.columns for form in forms)
    codes = [form.codes(slice(None)) for form in forms]
    beyond = sum(int(((z < -8) | (z > 7)).sum()) for z in codes) / weights
    wide = sum(len(form.dense) * form.columns for form in forms if form.width > 4) / weights
    four = sum(form.nbytes for form in forms)
    sizes = (2 * weights, int8, four, stored)
    cells = " | ".join(f"{size / 1e6:.1f} ({8 * size / weights:.2f})" for size in sizes)
    return f"| {run} | {part} | {cells} | {beyond:.2%} | {wide:.0%} |"


def file_bytes(run: Path, names: dict) -> dict[str, int]:
    """Bytes of the tensors of each matrix in the entropy-coded file."""
    found = dict.fromkeys(names, 0)
    for path in sorted((run / "coded").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                owner = key.rpartition(".")[0]
                if owner in found:
                    found[owner] += file.get_tensor(key).nbytes
    return found


# --- layers -------------------------------------------------------------------------------------------------


def layers(run: Path) -> Iterator[str]:
    """Milliseconds of a product by layer, tokens and form."""
    model = read(run, "int4")
    names = [name for name in dict(model.named_modules()) if name.endswith(LAYERS)]
    middle = len(names) // len(LAYERS) // 2 * len(LAYERS)
    chosen = {name: model.get_submodule(name).matrix for name in names[middle : middle + len(LAYERS)]}
    pool = torch.cat([model.get_submodule(name).matrix.codes(slice(0, 64)).flatten() for name in names])
    drawn = pool[torch.randint(len(pool), (4096, 4096), generator=torch.Generator().manual_seed(0))]
    zeros = torch.zeros(4096, dtype=torch.int16)
    chosen["drawn"] = pack(drawn, zeros, zeros)
    del model
    yield f"{torch.get_num_threads()} thread(s), activations in bfloat16"
    yield "| layer | shape | beyond 4 bits | tokens | bf16, ms | int8 codes | int4, compiled | int4, torch |"
    yield "|---" * 8 + "|"
    for name, matrix in chosen.items():
        yield from products(name, matrix)


def products(name: str, matrix: Packed) -> Iterator[str]:
    """The lines of one layer."""
    rows, columns = len(matrix.dense), matrix.columns
    copies = max(2, CACHE // (2 * rows * columns))
    four = [Packed(matrix.width, columns, **{k: v.clone() for k, v in matrix.tensors.items()}) for _ in range(copies)]
    dense = [matrix.rows(slice(None)).bfloat16() for _ in range(copies)]
    eight = [int8_layer(matrix) for _ in range(copies)]
    generator = torch.Generator().manual_seed(0)
    beyond = len(matrix.places) / (rows * columns)
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, generator=generator).bfloat16()
        some = four[: max(2, copies // 20)]  # in torch alone it is slow anyway
        forms: list[tuple[Callable[[], object], int]] = [
            (lambda x=x: [torch.nn.functional.linear(x, weight) for weight in dense], copies),
            (lambda x=x: [layer.project(x) for layer in eight], copies),
            (lambda x=x: [form.multiply(x) for form in four], copies),
            (lambda x=x, some=some: [f.in_blocks(x, lambda a, b, f=f: f.rows(slice(a, b))) for f in some], len(some)),
        ]
        with torch.no_grad():
            bf16, *others = fastest(forms)
        cells = " | ".join(f"{1e3 * other:.3f} ({bf16 / other:.2f}x)" for other in others)
        yield f"| {name} | {rows} x {columns} | {beyond:.2%} | {tokens} | {1e3 * bf16:.3f} | {cells} |"


def int8_layer(matrix: Packed) -> CodedLinear:
    """The module that holds int8 codes, as the reader makes it."""
    rows, columns = len(matrix.dense), matrix.columns
    entry = {"shape": [rows, columns], "sizes": [1, 0, 1], "bases": [0, 0], "columns": "layer"}
    with torch.device("meta"):
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    layer = CodedLinear("layer", entry, linear)
    layer.row_steps.zero_()
    layer.unpack(matrix.codes(slice(None)), torch.zeros(columns, dtype=torch.uint8), torch.device("cpu"))
    return layer


def fastest(forms: list[tuple[Callable[[], object], int]]) -> list[float]:
    """Seconds of one product: the forms take turns, after a round that does not count."""
    best = [float("inf")] * len(forms)
    for turn in range(ROUNDS + 1):
        for index, (run, count) in enumerate(forms):
            started = time.perf_counter()
            run()
            if turn:
                best[index] = min(best[index], (time.perf_counter() - started) / count)
    return best


# --- whole models -------------------------------------------------------------------------------------------


def decode(run: Path, new: int) -> Iterator[str]:
    """Tokens a second of greedy decoding."""
    source = json.loads((run / "manifest.json").read_text())["recipe"]["model"]
    tokenizer = AutoTokenizer.from_pretrained(run / "coded")
    prompt = tokenizer("The lattice of integer points in the plane", return_tensors="pt").input_ids
    folder, models, loading = run / "int4", {}, {}
    readers = {
        "bf16": lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval(),
        "int8 codes": lambda: read(run, "int8"),
        "int4, compiled": lambda: read(run, "int4"),
        "int4, its own file": lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(),
    }
    readers = {name: reader for name, reader in readers.items() if folder.exists() or "file" not in name}
    for _ in range(2):  # the first time compiles
        for name, reader in readers.items():
            started = time.perf_counter()
            models[name] = reader()
            loading[name] = time.perf_counter() - started
    written: dict[str, Tensor] = {}

    def write(name: str) -> None:
        options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
        written[name] = models[name].generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    seconds = fastest([(lambda name=name: write(name), new) for name in models])
    yield f"{torch.get_num_threads()} thread(s), {prompt.shape[1]} tokens of prompt, {new} new ones, {run.name}"
    yield "| form | tokens a second | to bf16 | seconds to load |"
    yield "|---|---|---|---|"
    for name, spent in zip(models, seconds):
        yield f"| {name} | {1 / spent:.1f} | {seconds[0] / spent:.2f}x | {loading[name]:.1f} |"
    same = torch.equal(written["int8 codes"], written["int4, compiled"])
    yield f"int8 and int4 wrote {'the same' if same else 'different'} text"


if __name__ == "__main__":
    main()
