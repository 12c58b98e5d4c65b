"""Run alone by `verify` in a fresh interpreter: load an export with stock readers and compare logits.

This file must not import geoquant: its whole point is that the reader's machine has none; where the format is our
own, `imports` says so. One JSON argument:
{folder, expected, adapter, dtype, paths, imports}; the last line of stdout is a JSON object with the outcome.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import time

READERS = {
    None: ("torch", "transformers", "compressed-tensors", "peft", "safetensors"),
    "gptq": ("torch", "transformers", "gptqmodel", "optimum", "peft", "safetensors"),
    "gguf": ("torch", "transformers", "gguf"),
}


def kind_of(folder):
    """`gguf`, what config.json calls the quantization, or None where the weights are ordinary ones."""
    if os.path.exists(os.path.join(folder, "model.gguf")):
        return "gguf"
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return (json.load(file).get("quantization_config") or {}).get("quant_method")


def versions(folder, adapter):
    """Installed versions of the readers in use."""
    found = {}
    for name in READERS.get(kind_of(folder), READERS[None]):
        if name != "peft" or adapter:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
    return found


def options(folder):
    """Keyword arguments for from_pretrained that a format asks for: of the model, and of the tokenizer."""
    kind = kind_of(folder)
    if kind == "gguf":
        return {"gguf_file": "model.gguf"}, {"gguf_file": "model.gguf"}
    if kind == "gptq":
        from transformers import GPTQConfig

        # Other kernels round activations or weights further; this one computes in the type that is asked for. Only
        # `backend` is taken from here, all else from the folder.
        return {"quantization_config": GPTQConfig(bits=4, backend="gptq_torch")}, {}
    return {}, {}


def load(folder, adapter, dtype):
    """The model as any user of stock transformers (and peft) gets it. Keys that do not fit are errors
    here.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_options, tokenizer_options = options(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **model_options)
    wrong = {
        kind: sorted(info[kind])[:3] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    }
    if wrong:
        raise ValueError(f"the folder does not fit the model: {wrong}")
    if tokenizer_options or os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        AutoTokenizer.from_pretrained(folder, **tokenizer_options)
    if adapter:
        from peft import PeftModel

        # The first forward pass unpacks packed weights; peft cannot wrap a linear layer without `weight`.
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def compare(model, tokens, expected):
    """Largest logit difference, their root mean square, the spread of the expected logits (NaN anywhere gives NaN)."""
    import torch

    with torch.no_grad():
        logits = torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in tokens])
    if logits.shape != expected.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected {tuple(expected.shape)}")
    difference = logits - expected
    return float(difference.abs().max()), float(difference.square().mean().sqrt()), float(expected.std())


def main(task):
    sys.path.extend(path for path in task["paths"] if path not in sys.path)
    start = time.perf_counter()
    outcome = {"versions": versions(task["folder"], task["adapter"])}
    try:
        for name in task["imports"]:
            importlib.import_module(name)
        import torch
        from safetensors.torch import load_file

        stored = load_file(task["expected"])
        model = load(task["folder"], task["adapter"], getattr(torch, task["dtype"]))
        names = "max_abs_diff", "rms_diff", "spread"
        outcome |= dict(zip(names, compare(model, stored["tokens"], stored["logits"])))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        outcome["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
    outcome["seconds"] = time.perf_counter() - start
    outcome["independent"] = not any(name.split(".")[0] == "geoquant" for name in sys.modules)
    return outcome


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
