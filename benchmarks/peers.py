"""Quantize a Hugging Face folder with a peer tool and measure it under GeoQuant's shared protocol.

One call measures one tool at one width and prints one JSON line. It stands alone on purpose (no import of
geoquant): each peer pins its own versions of transformers and numpy, so each lives in its own environment.

Protocol, the same for every tool: the linear layers of all blocks, symmetric groups of 64, embeddings and
head untouched, everything else at the tool's defaults. Calibration is the first 32 windows of 512 tokens of
one text, the test the first 40 windows of another. A text is tokenised whole without special tokens and cut
into consecutive windows that do not overlap; the first token of a window is not scored, and is BOS if and
only if the tokenizer adds one by default. The tool saves its checkpoint; its codes and scales are read back
from the file, multiplied out in float32 and put into the float32 model, whose perplexity is reported. So a
tool is judged by the values it ships and not by the precision of its CPU kernel.

What differs between the defaults: llm-compressor takes the float32 model it is given, computes in float32 and
stores float32 scales; GPTQModel casts the model to bfloat16 on a CPU (Hessians and solves in float32) and
stores float16 scales, zeros and a group index per column. `--dtype float32` makes GPTQModel keep float32.

`quantize_cpu_seconds` is user + system time (children included) of the tool's quantization call alone, with
all forwards of it, without imports, loading, saving and evaluation. `peak_rss_bytes` is the most the process
held until that call returned. `bits_per_weight` counts every tensor that the checkpoint stores for the
quantized layers (codes, scales, zeros, indices).

Environments (torch first, so that the tools do not choose another build; GPTQModel has no wheel):

    python3 -m venv peer-llmc
    peer-llmc/bin/pip install -U pip 'setuptools>=80' wheel
    peer-llmc/bin/pip install torch==2.13.0
    peer-llmc/bin/pip install llmcompressor==0.14.0.1 torch==2.13.0

    python3 -m venv peer-gptqm
    peer-gptqm/bin/pip install -U pip 'setuptools>=80' wheel maturin ninja
    peer-gptqm/bin/pip install torch==2.13.0
    export PATH=$PWD/peer-gptqm/bin:$PATH
    pip install --no-build-isolation gptqmodel==7.6.0 torch==2.13.0

Runs (on an otherwise idle machine, one at a time):

    peer-llmc/bin/python benchmarks/peers.py --tool none MODEL_DIR valid.txt test.txt
    peer-llmc/bin/python benchmarks/peers.py --tool llm_compressor --bits 3 MODEL_DIR valid.txt test.txt
    peer-gptqm/bin/python benchmarks/peers.py --tool gptq_model --bits 3 MODEL_DIR valid.txt test.txt
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

GROUP = 64
WINDOW = 512
CALIBRATION_WINDOWS = 32
TEST_WINDOWS = 40


@dataclass(frozen=True)
class Cost:
    """What a quantization call took: user + system seconds, wall seconds, peak resident bytes."""

    cpu_seconds: float
    wall_seconds: float
    peak_rss_bytes: int


class Meter:
    """Context manager that measures its body; `cost` is set when it ends."""

    def __enter__(self) -> Meter:
        self._cpu, self._wall = _cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.cost = Cost(_cpu_seconds() - self._cpu, time.perf_counter() - self._wall, _peak_rss())


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB


def windows(tokenizer, path: str, count: int):
    """The first `count` windows of the text file, int64 (count, WINDOW)."""
    import torch

    first = tokenizer("a").input_ids[:1]
    bos = [tokenizer.bos_token_id] if first == [tokenizer.bos_token_id] else []
    body = WINDOW - len(bos)
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    if len(ids) < count * body:
        sys.exit(f"{path} is too short: it has {len(ids)} tokens, wanted at least {count * body}")
    return torch.tensor([bos + ids[i * body : (i + 1) * body] for i in range(count)])


def load_model(folder: str):
    """The model in float32, ready for evaluation."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def perplexity(model, tokens) -> float:
    """exp of the mean negative log likelihood of all tokens but the first of each window."""
    import torch
    from torch.nn.functional import cross_entropy

    total = 0.0
    with torch.inference_mode():
        for window in tokens:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            total += cross_entropy(logits.float(), window[1:], reduction="sum").item()
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


def unpack(words, bits: int):
    """int32 (..., n) holding a dense little-endian stream of codes -> int64 (..., n * 32 // bits).

    Both checkpoint formats use this stream at 3 and 4 bits (compressed-tensors since 0.19).
    """
    import torch

    stream = (words.to(torch.int64).unsqueeze(-1) >> torch.arange(32)) & 1
    stream = stream.flatten(-2)
    stream = stream[..., : stream.shape[-1] // bits * bits].unflatten(-1, (-1, bits))
    return (stream << torch.arange(bits)).sum(-1)


def read_tensors(folder: Path) -> dict:
    """All tensors of the folder's safetensors files."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def by_module(tensors: dict, marker: str) -> dict[str, dict]:
    """{module name: {tensor name: tensor}} of the modules that have a tensor called `marker`."""
    modules = {name.removesuffix("." + marker): {} for name in tensors if name.endswith("." + marker)}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in modules:
            modules[module][leaf] = tensor
    return modules


def quantize_llm_compressor(model_dir: str, calibration, bits: int, dtype: str, out: Path) -> Cost:
    """llm-compressor's GPTQModifier at its defaults, saved in its compressed-tensors format."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    if dtype != "default":
        sys.exit("--dtype is for gptq_model; llm_compressor computes in the float32 of the model it is given")
    model = load_model(model_dir)
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration]
    with Meter() as meter:
        oneshot(model=model, recipe=recipe, dataset=torch.utils.data.DataLoader(samples, batch_size=1))
    model.save_pretrained(out, save_compressed=True)
    return meter.cost


def dequantize_llm_compressor(folder: Path, bits: int) -> tuple[dict, float]:
    """({module: float32 weight (out, in)}, bits per weight) of a pack-quantized checkpoint."""
    weights, stored, count = {}, 0, 0
    for name, part in by_module(read_tensors(folder), "weight_packed").items():
        rows, columns = part["weight_shape"].tolist()
        codes = unpack(part["weight_packed"], bits)[:, :columns] - 2 ** (bits - 1)
        scale = part["weight_scale"].float().repeat_interleave(GROUP, dim=1)
        if "weight_g_idx" in part:
            scale = part["weight_scale"].float()[:, part["weight_g_idx"].long()]
        weights[name] = codes.float() * scale
        stored += sum(t.numel() * t.element_size() for leaf, t in part.items() if leaf != "weight_shape")
        count += rows * columns
    return weights, 8 * stored / count


def quantize_gptq_model(model_dir: str, calibration, bits: int, dtype: str, out: Path) -> Cost:
    """GPTQModel's GPTQ at its defaults, saved in its gptq format."""
    # Its default of half the cores leaves a pool that its own loader finds too small on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    options = {} if dtype == "default" else {"dtype": dtype}
    model = GPTQModel.load(model_dir, QuantizeConfig(bits=bits, group_size=GROUP), **options)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration]
    with Meter() as meter:
        model.quantize(samples, batch_size=1)
    model.save(str(out))
    return meter.cost


def dequantize_gptq_model(folder: Path, bits: int) -> tuple[dict, float]:
    """({module: float32 weight (out, in)}, bits per weight) of a gptq checkpoint."""
    config = json.loads((folder / "quantize_config.json").read_text())
    # The first version of the format stores zeros minus one; the second stores them as they are.
    shift = 1 if config.get("checkpoint_format", config.get("format")) == "gptq" else 0
    weights, stored, count = {}, 0, 0
    for name, part in by_module(read_tensors(folder), "qweight").items():
        codes = unpack(part["qweight"].T.contiguous(), bits)  # (out, in)
        zeros = unpack(part["qzeros"], bits).T + shift  # (out, groups)
        if not (zeros == 2 ** (bits - 1)).all():
            raise ValueError(f"{name}: a symmetric grid has zero {2 ** (bits - 1)}, got {zeros.unique()}")
        group = part["g_idx"].long()
        weights[name] = (codes - zeros[:, group]).float() * part["scales"].float().T[:, group]
        stored += sum(t.numel() * t.element_size() for leaf, t in part.items() if leaf != "bias")
        count += codes.numel()
    return weights, 8 * stored / count


TOOLS = {
    "llm_compressor": ("llmcompressor", quantize_llm_compressor, dequantize_llm_compressor),
    "gptq_model": ("gptqmodel", quantize_gptq_model, dequantize_gptq_model),
}


def put(model, weights: dict) -> None:
    """Replace the weights in place; ValueError when one is missing, extra, or plainly not its original."""
    import torch

    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name for name in linears if not name.endswith("lm_head")}
    if wanted != set(weights):
        raise ValueError(f"the checkpoint has {len(weights)} quantized layers, wanted all {len(wanted)}")
    for name, weight in weights.items():
        original = model.get_submodule(name).weight
        error = ((weight - original).norm() / original.norm()).item()
        # A misread stream gives noise of the weight's own size (ratio about 1.4); 3-bit GPTQ stays below 0.5.
        if not error < 0.7:
            raise ValueError(f"{name}: relative difference to the original is {error:.2f}; format misread?")
        original.data.copy_(weight)


def measure(arguments) -> dict:
    """The result line of one tool at one width."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    calibration = windows(tokenizer, arguments.calibration, CALIBRATION_WINDOWS)
    test = windows(tokenizer, arguments.test, TEST_WINDOWS)
    result = {
        "tool": arguments.tool,
        "bits": arguments.bits,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
    }
    if arguments.tool == "none":
        with Meter() as meter:
            model = load_model(arguments.model)
        result |= {"version": f"torch {torch.__version__}", "bits": 32, "bits_per_weight": 32.0}
        cost = Cost(0.0, 0.0, meter.cost.peak_rss_bytes)
    else:
        package, quantize, dequantize = TOOLS[arguments.tool]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "checkpoint"
            cost = quantize(arguments.model, calibration, arguments.bits, arguments.dtype, out)
            weights, bits_per_weight = dequantize(out, arguments.bits)
        model = load_model(arguments.model)
        put(model, weights)
        result |= {
            "version": importlib.metadata.version(package),
            "bits_per_weight": round(bits_per_weight, 4),
        }
    return result | {
        "perplexity": round(perplexity(model, test), 4),
        "quantize_cpu_seconds": round(cost.cpu_seconds, 1),
        "wall_seconds": round(cost.wall_seconds, 1),
        "peak_rss_bytes": cost.peak_rss_bytes,
    }


def main() -> None:
    """Read the command line, measure, print one JSON line on stdout; all logs go to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("calibration", help="text file; its first 32 windows of 512 tokens are used")
    parser.add_argument("test", help="text file; its first 40 windows of 512 tokens are used")
    parser.add_argument("--tool", choices=["none", *TOOLS], required=True)
    parser.add_argument("--bits", type=int, choices=[3, 4], default=4)
    parser.add_argument("--threads", type=int, default=1, help="default 1: CPU seconds then hold no spinning")
    parser.add_argument("--dtype", choices=["default", "float32"], default="default", help="for gptq_model")
    arguments = parser.parse_args()
    # Before torch is imported: worker threads that a tool starts take the number from here.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(arguments)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
