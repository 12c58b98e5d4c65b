"""Shared fixtures: tiny real models in Hugging Face folders, with a working tokenizer, made here and now."""

from __future__ import annotations

import os

# Tiny tensors: a second thread only waits for the first, and badly so on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch


def make_tokenizer():
    """A byte-level BPE tokenizer without merges: every text can be encoded, no file is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, **{symbol: 3 + index for index, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def tiny_llama(seed: int = 0, **changes):
    """A 2-block Llama with tied embeddings; weights large enough that its logits are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    } | changes
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def taught_by_heart(folder, records, out):
    """The model of a folder after thirty steps on all records of a file, in the folder `out`."""
    from geoquant.data.records import read_records
    from geoquant.model.load import load
    from geoquant.observe.texts import padded
    from geoquant.privacy.scoring import encode

    loaded = load(str(folder), dtype=torch.float32)
    model = loaded.model.requires_grad_(True)
    text = padded([ids for ids, _ in encode(loaded.tokenizer, read_records(records), 256)], 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        labels = text.tokens.masked_fill(torch.arange(text.tokens.shape[1]) >= text.lengths[:, None], -100)
        model(text.tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def constant_machine():
    """How fast this machine multiplies is measured elsewhere, and takes a second each time."""
    from geoquant.plan import estimate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "gemm_rate", lambda *_: 1e10)
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Path of an HF folder with the tiny Llama (float32) and its tokenizer. Read only: copy before changing."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_model_dir):
    """The tiny Llama, freshly loaded by stock transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir):
    """The byte-level tokenizer of the tiny model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)
