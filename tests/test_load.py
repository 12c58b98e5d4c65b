"""Loading: what can be read is read exactly, and each way to fail is one line that names the cause."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_tokenizer, tiny_llama
from geoquant.errors import UserError
from geoquant.model.load import load, load_tokenizer


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def message(spec, **settings) -> str:
    with pytest.raises(UserError) as raised:
        load(str(spec), **settings)
    text = str(raised.value)
    assert "\n" not in text
    return text


def rewrite(folder, change) -> None:
    """Apply `change` to the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(folder, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_is_loaded_in_its_stored_type(folder, dtype):
    rewrite(folder, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    stored = load_file(folder / "model.safetensors")
    found = load(str(folder))  # the config still says float32
    assert found.dtype == found.model.dtype == dtype
    assert all(torch.equal(p, stored[n]) for n, p in found.model.named_parameters())
    assert found.name == "model"
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())
    assert load(str(folder), dtype=torch.float32).dtype == torch.float32


def test_tied_embeddings_stay_tied_and_are_counted_once(tiny_model_dir):
    found = load(str(tiny_model_dir))
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    assert found.parameters == sum(t.numel() for t in load_file(tiny_model_dir / "model.safetensors").values())


def test_the_tokenizer_comes_along(tiny_model_dir):
    ids = load(str(tiny_model_dir)).tokenizer("héllo", add_special_tokens=False).input_ids
    assert ids == load_tokenizer(str(tiny_model_dir))("héllo", add_special_tokens=False).input_ids
    assert len(ids) == 6


def test_the_identity_follows_the_weights_only(folder, tiny_model_dir):
    original = load(str(tiny_model_dir)).sha256
    configure(folder, note="anything")
    assert load(str(folder)).sha256 == original
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    assert load(str(folder)).sha256 != original


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    tiny_llama().save_pretrained(folder, max_shard_size="30KB")
    make_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_shards(sharded):
    wanted = tiny_llama().state_dict()
    assert all(torch.equal(p, wanted[n]) for n, p in load(str(sharded)).model.named_parameters())


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert message(sharded) == (
        f"weights file {shard} is missing (named in model.safetensors.index.json); download it again"
    )


def test_a_tensor_missing_from_its_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != lost}, shard, metadata={"format": "pt"})
    assert message(sharded) == f"tensor {lost} is missing from {shard}; download or save the weights again"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": []}}'])
def test_a_damaged_index_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is damaged" in message(sharded)


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert message(folder) == (
        f"tensor model.layers.1.mlp.up_proj.weight is missing from {folder} (1 in all); "
        "download or save the weights again"
    )


def test_a_tensor_of_another_shape_is_one_line(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert message(folder).startswith(f"cannot load the model {folder}: ")


@pytest.mark.parametrize("keep", [0, 5, 100, -50])
def test_truncated_weights_are_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    text = message(folder)
    assert text.startswith(f"weights file {path} is truncated or damaged: ")
    assert text.endswith("; download or copy it again")


def test_a_git_lfs_pointer_is_recognised(folder):
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n")
    assert message(folder) == f"weights file {path} is a Git LFS pointer, not the weights; run there: git lfs pull"


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_no_number_is_named(folder, value, shown, dtype):
    def change(tensors):
        tensors.update({n: t.to(dtype) for n, t in tensors.items()})
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = value

    rewrite(folder, change)
    assert message(folder) == (
        "tensor model.layers.1.self_attn.k_proj.weight holds 1 NaN or infinite values "
        f"(first: {shown}); the weights are damaged or the training diverged: use an earlier checkpoint"
    )


def test_large_finite_values_are_no_infinity(folder):
    """Their float32 sum overflows, they do not."""
    rewrite(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38))
    assert load(str(folder)).parameters > 0


def test_a_folder_without_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()
    wanted = f"{folder} has no tokenizer; wanted tokenizer.json; copy the base model's tokenizer files there"
    assert message(folder) == wanted
    with pytest.raises(UserError) as raised:
        load_tokenizer(str(folder))
    assert str(raised.value) == wanted


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert message(folder).startswith(f"cannot load the tokenizer of {folder}: ")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert message(folder) == f"{folder} has no config.json; wanted a Hugging Face model folder"


def test_an_adapter_is_no_model(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert message(folder) == f"{folder} is an adapter, no model; merge it into its base and give the whole model"


def test_the_folder_above_a_model_is_not_the_model(folder):
    wanted = f"{folder.parent} has no config.json; wanted a Hugging Face model folder; did you mean {folder}?"
    assert message(folder.parent) == wanted
    run = folder.parent / "run"
    run.mkdir()
    (run / "manifest.json").write_text("{}")
    assert message(folder.parent) == wanted  # nobody quantizes a run
    assert message(folder.parent, quantized=True) == wanted.removesuffix("?") + f" or {run}?"


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    assert message(folder).startswith(f"{folder}/config.json is damaged: ")


def test_an_unknown_architecture(folder):
    configure(folder, model_type="llamma", architectures=["LlammaForCausalLM"])
    assert "llamma" in message(folder)


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert message(folder) == f"{folder} holds pickled .bin weights; wanted safetensors; convert them first"


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    assert message(folder) == f"{folder} holds no model.safetensors; download or save the weights again"


def test_an_already_quantized_folder(folder):
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert message(folder) == (
        f"{folder} is already quantized (gptq); wanted full-precision weights (fp32, bf16, fp16)"
    )
    configure(folder, quantization_config=None)
    assert load(str(folder)).dtype == torch.float32


def test_eight_bit_floats_are_not_taken_for_weights(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    assert message(folder) == (
        f"tensor {name} in {folder}/model.safetensors is in the 8-bit type F8_E4M3; "
        "wanted full-precision weights (fp32, bf16, fp16)"
    )


def test_nothing_there(tmp_path):
    kinds = "wanted an HF folder, a hub id (owner/name), a .gguf file, or `demo`"
    assert message(tmp_path / "none") == f"no model at {tmp_path / 'none'}; {kinds}"
    assert message("nonsense") == f"no model at nonsense; {kinds}"
    (tmp_path / "notes.txt").write_text("x")
    assert message(tmp_path / "notes.txt").endswith("is a file; wanted an HF folder, a hub id or a .gguf file")


def test_a_hub_id_offline():
    assert message("someone/some-model") == (
        "no folder someone/some-model, and the hub is switched off (HF_HUB_OFFLINE=1); "
        "give a folder, or unset HF_HUB_OFFLINE"
    )


def test_a_device_that_is_not_there(tiny_model_dir):
    text = message(tiny_model_dir, device="cuda:77")
    assert text.startswith("cannot compute on device 'cuda:77': ")
    assert text.endswith("; use --device cpu")


def test_meta_holds_no_numbers(tiny_model_dir):
    assert message(tiny_model_dir, device="meta").startswith("cannot compute on device 'meta': ")


@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_beyond_the_embedding(folder, special):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{number}>" for number in range(304 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    load(str(folder))  # just full
    tokenizer.add_tokens(["<image>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    if special:  # as Gemma 3 has it: no text becomes this token
        load(str(folder))
        return
    text = message(folder)
    assert "does not belong to its model; got token '<image>' with the id 304 (1 such tokens); wanted ids below" in text


# --- GGUF -------------------------------------------------------------------------------------------------------

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Llama's q and k rows as GGUF orders them: rotary pairs side by side instead of half a head apart."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, model, *, kind=gguf.GGMLQuantizationType.F32, drop: str = "", value: float | None = None):
    """`model` as a Llama GGUF file with a byte-level tokenizer, its matrices in type `kind`."""
    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += ["ab"]
    tokens += [f"<pad{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.named_parameters():
        inner = name.removesuffix(".weight")
        inner = inner.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        inner = inner.replace("model.layers.", "blk.")
        for ours, theirs in NAMES.items():
            inner = inner.replace(ours, theirs)
        if inner == drop:
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        data = tensor.detach()
        if (last := inner.rpartition(".")[2]) in heads:
            data = permuted(data, heads[last])
        data = data.numpy().astype(np.float32)
        if value is not None and inner == "blk.1.ffn_up":
            data[2, 3] = value
        if data.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(inner + ".weight", data)
        elif kind.name.startswith("IQ4"):  # gguf cannot quantize to it; zeros are valid blocks
            block, size = gguf.GGML_QUANT_SIZES[kind]
            packed = np.zeros((data.shape[0], data.shape[1] // block * size), dtype=np.uint8)
            writer.add_tensor(inner + ".weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(inner + ".weight", gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama():
    return tiny_llama(intermediate_size=64)  # a multiple of GGUF's block of 32


def test_a_gguf_file_is_the_same_model(llama, tmp_path):
    found = load(str(write_gguf(tmp_path / "tiny.gguf", llama)))
    assert (found.name, found.dtype) == ("tiny", torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(found.model(tokens).logits, llama(tokens).logits, atol=1e-4, rtol=0)
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    assert found.tokenizer.decode(found.tokenizer("Hi you", add_special_tokens=False).input_ids) == "Hi you"
    assert getattr(found.model.config, "quantization_config", None) is None


def test_a_quantized_gguf_file_is_unpacked(llama, tmp_path):
    found = load(str(write_gguf(tmp_path / "q8.gguf", llama, kind=gguf.GGMLQuantizationType.Q8_0)))
    weight, wanted = found.model.model.layers[0].mlp.up_proj.weight, llama.model.layers[0].mlp.up_proj.weight
    error = (weight - wanted).abs().max()
    assert 0 < error < wanted.abs().max() / 100
    found.model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("share", [0.001, 0.3, 0.95])
def test_a_truncated_gguf_file(llama, tmp_path, share):
    path = write_gguf(tmp_path / "cut.gguf", llama)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    text = message(path)
    assert text.startswith(f"GGUF file {path} is truncated or damaged: ")
    assert text.endswith("; download it again")


def test_a_gguf_type_that_nobody_knows(llama, tmp_path):
    """A newer llama.cpp may have types that the installed reader has never heard of."""
    path = write_gguf(tmp_path / "new.gguf", llama, kind=gguf.GGMLQuantizationType.Q8_0)
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # after the name: 2 dimensions, their sizes, then the type
    assert data[at] == gguf.GGMLQuantizationType.Q8_0
    data[at] = 199
    path.write_bytes(data)
    assert message(path) == (
        f"GGUF file {path} holds tensors of the unknown quantization type 199; use a file in another type "
        "(F16, Q8_0, Q4_K...), or the model's Hugging Face folder"
    )


def test_a_gguf_type_that_cannot_be_unpacked(llama, tmp_path, monkeypatch):
    kind = gguf.GGMLQuantizationType.IQ4_NL
    path = write_gguf(tmp_path / "iq.gguf", llama, kind=kind)
    monkeypatch.delitem(gguf.quants._type_traits, kind)  # what an older gguf package is like
    assert message(path).startswith(f"GGUF file {path} holds tensors of a type that cannot be read: IQ4_NL; got it in ")


def test_a_gguf_file_with_a_nan(llama, tmp_path):
    text = message(write_gguf(tmp_path / "nan.gguf", llama, value=float("nan")))
    assert text.startswith("tensor model.layers.1.mlp.up_proj.weight holds 1 NaN")


def test_a_gguf_file_without_a_tensor(llama, tmp_path):
    path = write_gguf(tmp_path / "part.gguf", llama, drop="blk.1.ffn_up")
    assert message(path).startswith(f"tensor model.layers.1.mlp.up_proj.weight is missing from {path} (1 in all)")


def test_a_gguf_file_of_another_architecture(llama, tmp_path):
    path = write_gguf(tmp_path / "clip.gguf", llama)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamx", 1))
    text = message(path)
    assert text.startswith(f"cannot load the GGUF file {path}: ")
    assert "llamx" in text
    assert text.endswith("; give the model's Hugging Face folder instead")


def test_a_file_that_only_claims_to_be_gguf(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<html>not found</html>")
    assert message(path) == f"{path} is not a GGUF file (it does not begin with GGUF); download it again"
    assert message(tmp_path / "none.gguf") == f"no GGUF file {tmp_path / 'none.gguf'}"
