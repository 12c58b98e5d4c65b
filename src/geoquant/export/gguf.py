"""GGUF, the one-file format of llama.cpp: our codes and steps in its blocks, everything else in 16 or 32 bits.

Steps become float16 and repeat in each block of 32 columns; codes stay what they are (gguf_blocks). The llama
architecture wants the rows of the query and key projections in another order, because llama.cpp rotates neighbouring
rows of a head where transformers rotates row j with row j + d/2: rows move together with their steps, and nothing else
changes. The vocabulary comes along (gguf_tokenizer), so the file is all that a reader needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from geoquant.errors import UserError
from geoquant.export.gguf_blocks import BLOCK, block_type, blocks_of
from geoquant.export.gguf_tokenizer import vocabulary
from geoquant.export.steps import Rounding
from geoquant.export.weights import (
    ExportResult,
    cast,
    chosen_dtype,
    linear_site,
    summarize,
    tied_weights,
    untouched,
)
from geoquant.lattice.grid import Grid
from geoquant.methods.problem import Solution
from geoquant.runs import atomic_directory, atomic_write

__all__ = ["FILE", "export_gguf", "kept_columns", "refuse_or_note", "stored_bits"]

FILE = "model.gguf"
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
STORED = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def stored_bits(grid: Grid) -> float:
    """Bits per weight on disk, steps and offsets included."""
    return 8 * block_type(grid).bytes / BLOCK


def refuse_model(config: object) -> None:
    """Raise UserError for a model that llama.cpp would compute otherwise, or that we cannot describe to it."""
    kind = getattr(config, "model_type", "unknown")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"GGUF export does not know the architecture {kind}",
            wanted=f"one of {', '.join(ARCHITECTURES)}",
            fix="choose another --format",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    strange = [
        name
        for name, there in (
            (f"rope type {rope.get('rope_type')}", rope.get("rope_type", "default") != "default"),
            ("a partial rotation", rope.get("partial_rotary_factor", 1.0) != 1.0),
            ("a sliding window", bool(getattr(config, "use_sliding_window", False))),
            ("biases", kind == "llama" and bool(config.attention_bias or config.mlp_bias)),
            (f"the activation {config.hidden_act}", config.hidden_act != "silu"),
        )
        if there
    ]
    if strange:
        raise UserError(
            f"GGUF export of {kind} models does not know {' or '.join(strange)}", fix="choose another --format"
        )


def refuse(name: str, module: nn.Linear, grid: Grid) -> None:
    """Raise UserError if the blocks of a GGUF file cannot hold site `name` with this grid."""
    block_type(grid)
    columns, size = module.in_features, grid.group_size
    if columns % BLOCK:
        raise UserError(
            f"GGUF blocks hold {BLOCK} columns; {name} has {columns}",
            wanted=f"a multiple of {BLOCK}",
            fix="choose --format compressed-tensors or dense",
        )
    if size < columns and size % BLOCK:
        raise UserError(
            f"GGUF blocks hold {BLOCK} columns; got groups of {size}",
            wanted=f"a multiple of {BLOCK}",
            fix=f"choose --group-size {max(1, size // BLOCK) * BLOCK}",
        )


def refuse_or_note(model: nn.Module, grids: Mapping[str, Grid], tokenizer: object = None) -> tuple[str, ...]:
    """Raise UserError for what a GGUF file of this model cannot hold; else notes on what the file costs.

    tokenizer: looked at where it is given.
    """
    refuse_model(model.config)
    modules, tied = dict(model.named_modules()), tied_weights(model)
    wider: Counter[str] = Counter()
    for name, grid in grids.items():
        refuse(name, linear_site(name, modules, tied, "GGUF"), grid)
        kind = block_type(grid)
        if kind.bits != grid.bits:
            wider[f"{grid.bits}-bit codes are stored in {kind.bits} bits ({kind.name})"] += 1
    if tokenizer is not None:
        vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
    return tuple(f"{count} sites: {note}" for note, count in wider.items())


def rotated_rows(config: object, name: str) -> Tensor | None:
    """Where row i of a query or key projection comes from in transformers' order, or None where rows stay.

    In a head of d rows, transformers' rotation pairs j with j + d/2; llama.cpp's pairs 2 j with 2 j + 1.
    """
    layer = name.rpartition(".")[2]
    if config.model_type != "llama" or layer not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
    rows = torch.arange(heads * config.head_dim)
    return rows.view(heads, 2, config.head_dim // 2).transpose(1, 2).reshape(-1)


def describe(writer: gguf.GGUFWriter, model: nn.Module, tokenizer: object, kinds: Counter[str]) -> None:
    """The metadata: architecture, sizes, rotation, vocabulary."""
    config, rope = model.config, getattr(model.config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(f"{config.model_type} quantized by geoquant")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kinds.most_common(1)[0][0]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    words = vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    writer.add_token_merges(list(words.merges))
    for name, place in words.special.items():
        getattr(writer, f"add_{name}_token_id")(place)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def export_gguf(
    model: nn.Module,
    tokenizer: object,
    solutions: Mapping[str, Solution],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    replaced: Mapping[str, Tensor] | None = None,
) -> ExportResult:
    """Write `out`/model.gguf, which llama.cpp runs and transformers unpacks.

    solutions: per site name, read twice (once for the sizes, once for the blocks), one site at a time. dtype: of
    embeddings and whatever other matrix a run did not touch; default: that of the model, float16 for float32. Norms and
    biases are float32. replaced: parameters that take the place of the model's, by name. Raises UserError for what
    `refuse_or_note` refuses, for kept columns, for steps beyond float16, and when the disk is full.
    """
    dtype = chosen_dtype(model, dtype or (torch.float16 if model.dtype == torch.float32 else None))
    grids = {}
    for name, solution in solutions.items():
        if solution.kept_index.numel():
            raise kept_columns()
        grids[name] = solution.grid
    refuse_or_note(model, grids)
    if tokenizer is None:
        raise UserError("a GGUF file needs the tokenizer")
    modules = dict(model.named_modules())
    kinds = {name: block_type(grid) for name, grid in grids.items()}
    names = gguf.get_tensor_name_map(ARCHITECTURES[model.config.model_type], model.config.num_hidden_layers)
    linear, rounding = 0, Rounding()

    def file_name(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"GGUF has no name for the tensor {name}", fix="choose another --format")
        return found

    def blocks() -> Iterator[Tensor]:
        nonlocal linear, rounding
        for name, solution in solutions.items():
            if tuple(solution.codes.shape) != tuple(modules[name].weight.shape):
                raise ValueError(f"{name}: codes {tuple(solution.codes.shape)}, {tuple(modules[name].weight.shape)}")
            packed, changed = blocks_of(name, solution)
            rounding += changed
            linear += packed.nbytes
            yield packed if (rows := rotated_rows(model.config, name)) is None else packed[rows]

    def others() -> Iterator[tuple[str, Tensor, torch.dtype]]:
        for name, tensor in untouched(model, grids, model.dtype, replaced):
            rows = rotated_rows(model.config, name.rpartition(".")[0])
            yield name, tensor if rows is None else tensor[rows], torch.float32 if tensor.dim() == 1 else dtype

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
        try:
            describe(writer, model, tokenizer, Counter(kind.name for kind in kinds.values()))
            for name, kind in kinds.items():
                rows, columns = modules[name].weight.shape
                shape = (rows, columns // BLOCK * kind.bytes)
                raw = gguf.GGMLQuantizationType[kind.name]
                writer.add_tensor_info(file_name(f"{name}.weight"), shape, np.dtype(np.uint8), shape[0] * shape[1], raw)
            for name, tensor, stored in others():
                size = tensor.numel() * stored.itemsize
                writer.add_tensor_info(file_name(name), tensor.shape, np.dtype(np.float32), size, STORED[stored])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for packed in blocks():
                writer.write_tensor_data(packed.contiguous().numpy())
            for name, tensor, stored in others():
                values = cast(name, tensor.detach().cpu(), stored).contiguous()
                # numpy knows no bfloat16, and bytes are bytes.
                writer.write_tensor_data(values.view(torch.uint8).numpy())
        finally:
            writer.close()

    with atomic_directory(out) as folder:
        atomic_write(folder / FILE, write)
    return summarize(out, linear, rounding.notes())


def kept_columns() -> UserError:
    """Kept columns have no place in this format."""
    return UserError(
        "GGUF files hold no kept columns", fix="leave --keep out, or choose --format compressed-tensors or dense"
    )
