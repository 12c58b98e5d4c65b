"""What fine-tunes changed, read from their folders: against the weights themselves, and against peft's own merging."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import tiny_llama
from geoquant.errors import UserError
from geoquant.model.changes import Factors, folder_changes
from geoquant.releasing import tensors_of


def moved(model, size: float = 0.02):
    generator = torch.Generator().manual_seed(3)
    for own in model.parameters():
        own.data += size * torch.randn(own.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def base():
    return tensors_of(tiny_llama())


def test_whole_weights_in_one_file_and_in_shards(base, tmp_path):
    tuned = moved(tiny_llama())
    truth = {name: own.double() - base[name].double() for name, own in tensors_of(tuned).items()}
    for folder, size in (("one", "1GB"), ("many", "20KB")):
        tuned.save_pretrained(tmp_path / folder, max_shard_size=size)
        found = folder_changes(tmp_path / folder, base)
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], own) for name, own in truth.items())
    assert (tmp_path / "many/model.safetensors.index.json").exists()


def test_a_head_that_is_tied_may_be_stored_twice(base, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tied = frozenset({"lm_head.weight", "model.embed_tokens.weight"})
    assert "lm_head.weight" not in folder_changes(tmp_path, base, tied=tied)
    with pytest.raises(UserError, match=r"holds lm_head\.weight, which the public base has not"):
        folder_changes(tmp_path, base)


def adapter(model, folder, **settings):
    """A LoRA adapter with factors that are not zero; the tensors of the model with it merged in by peft."""
    peft = pytest.importorskip("peft")
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(1)
    for name, own in wrapped.named_parameters():
        if "lora_" in name:
            own.data = 0.1 * torch.randn(own.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return tensors_of(wrapped.merge_and_unload())


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"use_rslora": True}, {"lora_alpha": 1, "r": 5}),
        *({"init_lora_weights": start, "r": 4} for start in (False, "gaussian", "eva", "orthogonal", "mica")),
    ],
)
def test_an_adapter_changes_what_peft_merges(base, tmp_path, settings):
    merged = adapter(tiny_llama(), tmp_path, **settings)
    found = folder_changes(tmp_path, base)
    changed = {name for name, own in merged.items() if not torch.equal(own, base[name])}
    assert set(found) == changed
    for name in changed:
        change = found[name]
        assert isinstance(change, Factors)
        truth = merged[name].double() - base[name].double()
        assert torch.allclose(change.scale * change.left.double() @ change.right.double(), truth, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_initialisation_moved_the_base_is_refused_unless_it_was_converted(base, tmp_path, start):
    """Truth: what peft merges where it was trained. As it was saved, its factors are off by what they started with."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    wrapped = peft.get_peft_model(tiny_llama(), config)
    wrapped.save_pretrained(tmp_path / "start")
    fresh = json.loads((tmp_path / "start" / "adapter_config.json").read_text()) | {"init_lora_weights": True}
    (tmp_path / "start" / "adapter_config.json").write_text(json.dumps(fresh))
    for name, own in wrapped.named_parameters():
        if "lora_" in name:
            own.data += 0.01 * torch.randn(own.shape)
    wrapped.save_pretrained(tmp_path / "raw")
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merged = tensors_of(wrapped.merge_and_unload())
    with pytest.raises(UserError, match=f"had moved, not of the public base; got init_lora_weights = '{start}'; merge"):
        folder_changes(tmp_path / "raw", base)
    found = folder_changes(tmp_path / "converted", base)
    assert len(found) == 4
    for name, change in found.items():
        truth = merged[name].double() - base[name].double()
        assert torch.allclose(change.scale * change.left.double() @ change.right.double(), truth, atol=1e-5), name
    raw = json.loads((tmp_path / "raw" / "adapter_config.json").read_text()) | {"init_lora_weights": True}
    (tmp_path / "raw" / "adapter_config.json").write_text(json.dumps(raw))  # read without looking
    change = folder_changes(tmp_path / "raw", base)[name]
    assert (change.scale * change.left @ change.right - truth).norm() > 0.5 * base[name].norm()


def test_an_adapter_of_a_model_that_stores_its_weights_transposed(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    base = {name: own.clone() for name, own in tensors_of(model).items()}
    merged = adapter(model, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    change = folder_changes(tmp_path, base)["transformer.h.0.attn.c_attn.weight"]
    truth = merged["transformer.h.0.attn.c_attn.weight"] - base["transformer.h.0.attn.c_attn.weight"]
    assert change.left.shape[0] == 16
    assert torch.allclose(change.scale * change.left @ change.right, truth, atol=1e-6)


def test_the_digest_is_of_the_numbers_and_of_what_is_made_of_them(base, tmp_path):
    adapter(tiny_llama(), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert folder_changes(tmp_path / "one", base).digest() == folder_changes(tmp_path / "copy", base).digest()
    adapter(tiny_llama(), tmp_path / "louder", lora_alpha=7)  # the same factors
    assert folder_changes(tmp_path / "one", base).digest() != folder_changes(tmp_path / "louder", base).digest()


def test_what_is_no_change_of_this_base_is_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"is no fine-tune; wanted a folder with model\.safetensors, or a PEFT"):
        folder_changes(tmp_path, base)
    tiny_llama(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="has another shape than the base's"):
        folder_changes(tmp_path / "small", base)["model.embed_tokens.weight"]
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match=r"lacks model\.layers\.1"):
        folder_changes(tmp_path / "short", base)
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "long")
    with pytest.raises(UserError, match=r"holds model\.layers\.2.*which the public base has not"):
        folder_changes(tmp_path / "long", base)


def test_an_adapter_that_does_more_than_products_is_refused(base, tmp_path):
    adapter(tiny_llama(), tmp_path / "plain")

    def changed(**settings):
        folder = tmp_path / "-".join(settings)
        shutil.copytree(tmp_path / "plain", folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | settings))
        return folder

    others = ({"kasa_config": {"x": 1}}, {"use_qalora": True}, {"alora_invocation_tokens": [1, 2]}, {"lora_bias": True})
    for settings in ({"use_dora": True}, {"rank_pattern": {"q_proj": 8}}, {"modules_to_save": ["lm_head"]}, *others):
        with pytest.raises(UserError, match=f"is not a plain LoRA; got {next(iter(settings))}; merge the adapter"):
            folder_changes(changed(**settings), base)
    with pytest.raises(UserError, match="is not a plain LoRA; got IA3"):
        folder_changes(changed(peft_type="IA3"), base)
    with pytest.raises(UserError, match="is no LoRA adapter's"):
        folder_changes(changed(r=None), base)
    held = load_file(tmp_path / "plain/adapter_model.safetensors")
    trained = {"base_model.model.model.norm.weight": torch.ones(32)}
    save_file(held | trained, tmp_path / "plain/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds base_model\.model\.model\.norm\.weight, no factor"):
        folder_changes(tmp_path / "plain", base)
