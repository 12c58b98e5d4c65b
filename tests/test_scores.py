"""Scores against the definition: a plain full forward pass, one record at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoquant.data.private import make_records
from geoquant.data.records import Canary, Record, Split
from geoquant.data.text import digit_tokens
from geoquant.errors import UserError
from geoquant.privacy.scores import SplitScores, load_scores, save_scores
from geoquant.privacy.scoring import score_records, score_split

TEXTS = ("Ann Lee called from 201-555-0133.", "é€ ok", "a", "x", "Card 4000 1234, thanks!" * 3)
RECORDS = [Record(text) for text in TEXTS]
FIELDS = ("log_prob", "mean", "std", "rank", "digit_mass")


def slow(model, tokenizer, text: str, bos: bool) -> dict[str, np.ndarray]:
    """Every statistic by its definition."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = [tokenizer.bos_token_id, *ids] if bos else ids
    if len(ids) < 2:
        return {name: np.zeros(0) for name in FIELDS}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    p = torch.softmax(logits, 1)
    truth = torch.tensor(ids[1:])
    mean = (p * p.log()).sum(1)
    digit_ids = [tokenizer.convert_tokens_to_ids(d) for d in "0123456789"]
    mass = p[:, digit_ids].sum(1).log()
    mass[[t not in digit_ids for t in ids[1:]]] = float("nan")
    return {
        "log_prob": p[torch.arange(len(truth)), truth].log().numpy(),
        "mean": mean.numpy(),
        "std": ((p * p.log() ** 2).sum(1) - mean**2).sqrt().numpy(),
        "rank": np.array([sorted(range(len(q)), key=lambda z: (-q[z], z)).index(t) for q, t in zip(logits, truth)]),
        "digit_mass": mass.numpy(),
    }


def agree(scores, model, tokenizer, bos: bool = False) -> None:
    assert len(scores) == len(RECORDS)
    for index, text in enumerate(TEXTS):
        wanted = slow(model, tokenizer, text, bos)
        part = slice(scores.splits[index], scores.splits[index + 1])
        for name in FIELDS:
            np.testing.assert_allclose(getattr(scores, name)[part], wanted[name], atol=2e-4, err_msg=name)


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_scores_equal_the_definition_at_any_batch_size(tiny_model, tiny_tokenizer, batch_tokens):
    agree(
        score_records(tiny_model, tiny_tokenizer, RECORDS, batch_tokens=batch_tokens),
        tiny_model,
        tiny_tokenizer,
    )


def test_the_vocabulary_chunk_changes_nothing(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("geoquant.evaluate.perplexity.VOCABULARY_CHUNK", 304 * 7)
    agree(score_records(tiny_model, tiny_tokenizer, RECORDS), tiny_model, tiny_tokenizer)


def test_the_head_sees_only_the_asked_positions(tiny_model, tiny_tokenizer, monkeypatch):
    """Memory stays bounded: no call of the head projects more than a chunk of positions."""
    monkeypatch.setattr("geoquant.evaluate.perplexity.VOCABULARY_CHUNK", 304 * 7)
    rows = []
    tiny_model.lm_head.register_forward_hook(lambda m, i, o: rows.append(o.numel() // o.shape[-1]))
    score_records(tiny_model, tiny_tokenizer, RECORDS)
    assert max(rows) <= 7


def test_a_bos_that_the_tokenizer_adds_is_the_prefix_of_the_first_token(tiny_model, tiny_model_dir):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    scores = score_records(tiny_model, tokenizer, RECORDS)
    agree(scores, tiny_model, tokenizer, bos=True)
    assert scores.lengths[2] == 1
    assert scores.covering(2, 0, 1) is not None


def test_logits_changed_after_the_head_are_the_models_own(tiny_tokenizer):
    """Gemma-2 caps its logits after the head: projecting the hidden state ourselves would be wrong."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, initializer_range=0.3,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    agree(score_records(model, tiny_tokenizer, RECORDS), model, tiny_tokenizer)


def test_an_unknown_change_of_the_logits_is_refused(tiny_model, tiny_tokenizer):
    """No setting announces it: the check against the model's own logits must catch it."""
    original = type(tiny_model).forward

    class Scaled(type(tiny_model)):
        def forward(self, input_ids=None, use_cache=None, logits_to_keep=0, **more):
            output = original(self, input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **more)
            output.logits = output.logits * 0.5
            return output

    tiny_model.__class__ = Scaled
    with pytest.raises(UserError, match="changes its logits"):
        score_records(tiny_model, tiny_tokenizer, RECORDS)


def test_gpt2_style_models(tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=304, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    model = GPT2LMHeadModel(config).train()
    scores = score_records(model, tiny_tokenizer, RECORDS)
    assert model.training  # left as it was, yet scored without dropout
    agree(scores, model.eval(), tiny_tokenizer)


def test_covering_finds_the_tokens_of_a_span(tiny_model, tiny_tokenizer):
    scores = score_records(tiny_model, tiny_tokenizer, RECORDS)
    part = scores.covering(0, 4, 7)
    ids = tiny_tokenizer(TEXTS[0]).input_ids
    # Without BOS the first token is not scored: scored token t is token t + 1 of the text.
    low = scores.splits[0]
    assert tiny_tokenizer.decode(ids[part.start - low + 1 : part.stop - low + 1]) == "Lee"
    assert scores.covering(0, 0, 3) is None
    euro = scores.covering(1, 1, 2)
    assert euro.stop - euro.start == 3  # three bytes, one character


def test_long_records_are_cut_and_their_late_spans_not_measured(tiny_model, tiny_tokenizer):
    scores = score_records(tiny_model, tiny_tokenizer, [Record("abcdefghij")], max_tokens=6)
    assert scores.lengths.tolist() == [5]
    assert scores.covering(0, 4, 6) is not None
    assert scores.covering(0, 5, 7) is None
    assert scores.covering(0, 8, 9) is None


def test_record_sums_of_empty_records_are_zero(tiny_model, tiny_tokenizer):
    scores = score_records(tiny_model, tiny_tokenizer, RECORDS)
    sums = scores.record_sums(scores.log_prob)
    assert sums[2] == 0.0
    assert scores.lengths[2] == 0
    np.testing.assert_allclose(sums[0], scores.log_prob[: scores.splits[1]].sum(), rtol=1e-5)


def test_digit_tokens(tiny_tokenizer):
    ids = digit_tokens(tiny_tokenizer)
    assert tiny_tokenizer.convert_ids_to_tokens(ids.tolist()) == list("0123456789")


def merged_digits_tokenizer():
    """Byte-level BPE whose only merge is "1"+"2"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: 3 + index for index, symbol in enumerate(alphabet)} | {"09": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("0", "9")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_merged_digits_are_noticed_and_decoys_scored(tiny_model):
    tokenizer = merged_digits_tokenizer()
    assert digit_tokens(tokenizer) is None
    canaries = (Record("pin 0912", canary=Canary("a", 4, 8)), Record("key 5555", canary=Canary("b", 4, 8)))
    split = Split(tuple(make_records(3, 1)), tuple(make_records(3, 2)), canaries)
    scores = score_split(tiny_model, tokenizer, split, decoys=7)
    assert len(scores.decoys) == 14
    assert np.isnan(scores.canaries.digit_mass).all()


def test_saved_scores_are_read_back_and_other_records_refused(tiny_model, tiny_tokenizer, tmp_path):
    split = Split(tuple(RECORDS), tuple(make_records(3, 2)))
    scores = score_split(tiny_model, tiny_tokenizer, split)
    save_scores(tmp_path / "s.safetensors", scores, split)
    again = load_scores(tmp_path / "s.safetensors", split)
    assert isinstance(again, SplitScores)
    assert again.canaries is None
    for side in ("members", "nonmembers"):
        for name in (*FIELDS, "starts", "ends", "splits"):
            np.testing.assert_array_equal(getattr(getattr(again, side), name), getattr(getattr(scores, side), name))
    with pytest.raises(UserError, match="scores of other records"):
        load_scores(tmp_path / "s.safetensors", Split(tuple(RECORDS[:2]), split.nonmembers))


def test_progress_counts_records(tiny_model, tiny_tokenizer):
    seen = []
    score_records(tiny_model, tiny_tokenizer, RECORDS, progress=lambda *step: seen.append(step))
    assert seen[-1][:3] == ("score", len(RECORDS), len(RECORDS))
