"""Does the export mean what was solved? Reload it with stock readers in a fresh process and compare logits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.export import unread
from geoquant.model.halves import widened
from geoquant.runs import read_json, write_tensors

__all__ = ["VerifyResult", "verify", "write_expected"]

POSITIONS = 64

# Allowed largest logit difference, relative to the spread of the logits, by the coarsest dtype involved: the
# one the solved model ran in, or the one its untouched tensors are stored in. Rounding in bfloat16 alone makes 0.31
# where the solved model ran in float32.
TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-1}
# The largest of three million normal numbers is 5.2 times their root mean square. Roundings are such numbers; a wrong
# tensor moves most logits, and is caught by their root mean square, where a single wrong row is by the largest.
PEAK = 5.0


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of one reload: the largest difference of logits; it and their root mean square over the standard
    deviation of the expected logits; what is allowed of the largest, five times what is of the root mean square.
    """

    max_abs_diff: float
    max_rel: float
    rms_rel: float
    tolerance: float
    ok: bool
    independent: bool  # geoquant was not imported by the reader
    versions: dict[str, str | None]
    seconds: float


@torch.no_grad()
def write_expected(path: Path, model: nn.Module, tokens: Int[Tensor, "n length"]) -> None:
    """Store at most 64 positions of `tokens` and the float32 logits of the solved `model` on them."""
    tokens = tokens[:, :POSITIONS]
    tokens = tokens[: max(1, POSITIONS // tokens.shape[1])].to(torch.int64)
    training = model.training
    model.eval()
    try:
        with widened(model.device):
            logits = torch.cat([model(input_ids=row[None].to(model.device), use_cache=False).logits for row in tokens])
    finally:
        model.train(training)
    write_tensors(
        path,
        {"tokens": tokens.cpu(), "logits": logits.float().cpu()},
        metadata={"dtype": str(model.dtype).removeprefix("torch.")},
    )


def verify(
    folder: Path,
    expected_path: Path,
    adapter: Path | None = None,
    tolerance: float | None = None,
    *,
    dtype: str | None = None,
) -> VerifyResult:
    """Load `folder` (and `adapter`) with stock transformers (and peft) on the CPU of a fresh process.

    A folder in the format `geoquant` is read by transformers too, with geoquant imported beside it; one in `gptq` with
    GPTQModel's plain torch kernel; a GGUF file is unpacked by transformers.

    tolerance: allowed `max_rel`, and five times the allowed `rms_rel`; default by dtype.
    dtype: what to compute in; default: what the solved model ran in.

    The reader needs memory for the whole model: free yours first. Raises UserError when loading fails, or where a
    package that reads this format is absent.
    """
    try:
        with safe_open(expected_path, framework="pt") as file:
            solved = (file.metadata() or {}).get("dtype", "float32")
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {expected_path}: {error}", fix="run quantize again with --resume") from None
    dtype = dtype or solved
    if (folder / "model.gguf").exists():  # holds its own configuration
        config, method = {"dtype": "float16"}, "gguf"
    else:
        config = read_json(folder / "config.json")
        method = (config.get("quantization_config") or {}).get("quant_method")
    own = method == "geoquant"
    if method == "gptq" and (lacking := unread(method, folder)):
        raise UserError(lacking)
    if tolerance is None:
        stored = [config.get("dtype") or config.get("torch_dtype") or dtype]
        stored += ["float16"] if method == "gptq" else []  # what its reader multiplies codes and steps in
        tolerance = max(TOLERANCE.get(name, TOLERANCE["bfloat16"]) for name in (dtype, solved, *stored))
    outcome = read_elsewhere(folder, expected_path, adapter, dtype, imports=("geoquant",) if own else ())
    used = ", ".join(f"{name} {version}" for name, version in outcome["versions"].items())
    if "error" in outcome:
        what = f"{folder} and {adapter}" if adapter else f"{folder}"
        raise UserError(f"stock readers cannot load {what}: {outcome['error']}", fix=f"readers: {used}")
    spread = outcome["spread"]
    largest, typical = (
        outcome[name] / spread if spread > 0 else math.inf if outcome[name] else 0.0
        for name in ("max_abs_diff", "rms_diff")
    )
    close = largest <= tolerance and typical <= tolerance / PEAK  # NaN compares false
    return VerifyResult(
        max_abs_diff=outcome["max_abs_diff"],
        max_rel=largest,
        rms_rel=typical,
        tolerance=tolerance,
        ok=close and (own or outcome["independent"]),
        independent=outcome["independent"],
        versions=outcome["versions"],
        seconds=outcome["seconds"],
    )


def read_elsewhere(
    folder: Path, expected: Path, adapter: Path | None, dtype: str, imports: tuple[str, ...] = ()
) -> dict:
    """The outcome of `_reader.py` in an isolated interpreter, which first imports `imports`."""
    found = [(torch.__file__, 1)] + ([(__file__, 2)] if imports else [])
    task = {
        "folder": str(folder.resolve()),
        "expected": str(expected.resolve()),
        "adapter": str(adapter.resolve()) if adapter else None,
        "dtype": dtype,
        # An isolated interpreter skips the user's site folder; torch may live there.
        "paths": sorted({str(Path(module).parents[depth]) for module, depth in found}),
        "imports": [*imports],
    }
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    # GPTQModel compiles its kernels, which takes longer than the one forward pass needed here, and a C++ compiler.
    quiet["TORCHDYNAMO_DISABLE"] = "1"
    child = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("_reader.py")), json.dumps(task)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if child.returncode < 0:
        raise UserError(
            f"the process that reloads {folder} was killed by signal {-child.returncode}",
            fix="most likely memory ran out: verify on a machine that holds the whole model",
        )
    try:
        return json.loads(child.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the process that reloads {folder} failed: {last}", got=f"exit {child.returncode}") from None
