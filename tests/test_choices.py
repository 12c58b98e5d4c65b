"""Multiple choice against brute force: one full forward pass a choice, by the definition."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch

from conftest import make_tokenizer, tiny_llama
from geoquant.errors import UserError
from geoquant.evaluate import perplexity as perplexity_module
from geoquant.evaluate.choices import ChoiceResult, Item, Task, choices, difference
from geoquant.evaluate.tasks import load_task

ITEMS = (
    Item("Question: What is wet?\n", ("water", "a very dry stone in the sun"), 0),
    Item("Question: Two and two?", ("three", "four", "five", "é€"), 1),
    Item("Q", ("a", "b", "c"), 2),
    Item("Question: long? " * 6, ("yes", "no, " * 9 + "no"), 1),
)
TASK = Task("small", ITEMS, "")


def brute_force(model, tokenizer, bos: tuple[int, ...] = ()) -> list[list[float]]:
    """Nats per byte of " choice" after "query\\nAnswer:"; the tokenizer has one token a byte, so no seams."""
    scores = []
    for item in ITEMS:
        row = []
        for choice in item.choices:
            prompt = tokenizer(item.query.rstrip() + "\nAnswer:", add_special_tokens=False).input_ids
            answer = tokenizer(" " + choice, add_special_tokens=False).input_ids
            ids = torch.tensor([[*bos, *prompt, *answer]])
            with torch.no_grad():
                log_p = model(ids).logits[0].double().log_softmax(1)
            start = len(bos) + len(prompt)
            total = sum(log_p[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
            row.append(total / len(choice.encode()))
        scores.append(row)
    return scores


def close(found: ChoiceResult, wanted: list[list[float]]) -> None:
    for a, b in zip(found.scores, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert found.correct == tuple(int(np.argmax(s)) == item.gold for s, item in zip(wanted, ITEMS))


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_scores_equal_brute_force_at_any_batch_size(tiny_model, tiny_tokenizer, batch_tokens):
    found = choices(tiny_model, tiny_tokenizer, TASK, batch_tokens=batch_tokens)
    close(found, brute_force(tiny_model, tiny_tokenizer))
    assert (found.name, found.items) == ("small", 4)


def test_the_brute_force_items_are_not_all_right_or_wrong(tiny_model, tiny_tokenizer):
    """So that the comparison above can fail."""
    winners = {int(np.argmax(row)) for row in brute_force(tiny_model, tiny_tokenizer)}
    assert len(winners) > 1


def test_bos_goes_first_where_the_tokenizer_adds_it(tiny_model):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("a").input_ids[0] == 0
    close(choices(tiny_model, tokenizer, TASK), brute_force(tiny_model, tokenizer, bos=(0,)))


def test_padding_is_not_seen_by_a_model_with_absolute_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=304, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, n_positions=256)
    model, tokenizer = GPT2LMHeadModel(config).eval(), make_tokenizer()
    close(choices(model, tokenizer, TASK), brute_force(model, tokenizer))


def test_only_the_choices_meet_the_vocabulary(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("geoquant.evaluate.choices.check_head", lambda *_: None)
    seen = []
    tiny_model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.numel() // 304))
    choices(tiny_model, tiny_tokenizer, TASK)
    assert sum(seen) == sum(len(" " + c) + (2 + 1 if c == "é€" else 0) for item in ITEMS for c in item.choices)
    assert perplexity_module.head_rows(tiny_model) >= max(seen)


def test_a_seam_that_the_tokenizer_merges_is_scored_from_the_same_place(tiny_model):
    """With a token for ": a", the prompt's last token depends on the choice: all score from its colon on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, ":Ġ", ":Ġa"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "Ġ"), (":Ġ", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    found = choices(tiny_model, tokenizer, Task("seam", (Item("Q?", ("ab", "cd"), 0),), ""))
    prefix = tokenizer("Q?\nAnswer").input_ids
    for score, tail in zip(found.scores[0], ([":Ġa", "b"], [":Ġ", "c", "d"])):
        ids = torch.tensor([prefix + [vocab[t] for t in tail]])
        with torch.no_grad():
            log_p = tiny_model(ids).logits[0].log_softmax(1)
        total = sum(log_p[t - 1, ids[0, t]].item() for t in range(len(prefix), ids.shape[1]))
        assert score == pytest.approx(total / 2, abs=1e-4)


def test_too_long_a_query_loses_its_start(tiny_tokenizer):
    model = tiny_llama(max_position_embeddings=40)
    lengths = []
    model.model.register_forward_hook(lambda m, i, o: lengths.append(o.last_hidden_state.shape[1]))
    full = Item("x" * 200 + " end of the query?", ("a", "b"), 0)
    short = Item(("x" * 200 + " end of the query?")[-30:], ("a", "b"), 0)  # 30 + "\nAnswer: a" = 40 tokens
    cut = choices(model, tiny_tokenizer, Task("t", (full,), ""))
    assert max(lengths) == 40
    np.testing.assert_allclose(cut.scores, choices(model, tiny_tokenizer, Task("t", (short,), "")).scores, atol=1e-5)
    huge = choices(model, tiny_tokenizer, Task("t", (Item("Q?", ("a" * 90, "b"), 0),), ""))
    assert all(math.isfinite(score) for score in huge.scores[0])


def test_ties_and_a_destroyed_model_count_as_wrong(tiny_model, tiny_tokenizer):
    same = Task("tie", (Item("Q?", ("same", "same"), 0),), "")
    assert choices(tiny_model, tiny_tokenizer, same).correct == (False,)
    tiny_model.model.norm.weight.data.fill_(float("nan"))
    found = choices(tiny_model, tiny_tokenizer, Task("nan", ITEMS, ""))
    assert found.accuracy == 0.0
    assert found.se == 0.0


def test_accuracy_standard_error_and_progress(tiny_model, tiny_tokenizer):
    calls = []
    gold = [int(np.argmax(row)) for row in brute_force(tiny_model, tiny_tokenizer)]
    items = [Item(i.query, i.choices, g) for i, g in zip(ITEMS, gold)]
    items[1] = Item(ITEMS[1].query, ITEMS[1].choices, (gold[1] + 1) % 4)
    found = choices(tiny_model, tiny_tokenizer, Task("t", tuple(items), ""), progress=lambda *a: calls.append(a))
    assert found.correct == (True, False, True, True)
    assert found.accuracy == 0.75
    assert found.se == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert found.to_dict() == {"name": "t", "accuracy": 0.75, "se": found.se, "items": 4}
    assert calls[-1] == ("t", 11, 11)


def result(correct: list[bool], name: str = "t") -> ChoiceResult:
    return ChoiceResult(name, float(np.mean(correct)), 0.0, len(correct), tuple(correct), ())


def test_difference_is_paired_and_mcnemar_is_exact():
    before = [True] * 20 + [False] * 20
    after = [True] * 12 + [False] * 8 + [True] * 2 + [False] * 18
    found = difference(result(before), result(after))
    change = np.array(after, float) - np.array(before, float)
    assert (found["won"], found["lost"]) == (2, 8)
    assert found["value"] == pytest.approx(-6 / 40)
    assert found["se"] == pytest.approx(change.std(ddof=1) / math.sqrt(40))
    # Two-sided: twice the chance of at most 2 heads in 10 throws.
    assert found["p"] == pytest.approx(2 * sum(math.comb(10, k) for k in range(3)) / 2**10)


def test_no_disagreement_is_no_evidence():
    found = difference(result([True, False]), result([True, False]))
    assert found == {"value": 0.0, "se": 0.0, "won": 0, "lost": 0, "p": 1.0}


def test_results_of_other_items_do_not_pair():
    with pytest.raises(ValueError, match="2 items of t cannot pair with 3 of t"):
        difference(result([True, False]), result([True, False, True]))


def write(tmp_path, *lines: str):
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = json.dumps({"query": "Q\u2028?", "choices": [" a", "b "], "gold": 1}, ensure_ascii=False)


def test_a_task_file_is_read_in_order_up_to_the_limit(tmp_path):
    other = json.dumps({"query": "R", "choices": ["c", "d", "e"], "gold": 0, "id": 5})
    path = write(tmp_path, GOOD, "", other)
    task = load_task(path)
    assert task.items == (Item("Q\u2028?", ("a", "b"), 1), Item("R", ("c", "d", "e"), 0))
    assert (task.name, len(task)) == ("task", 2)
    assert task.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_task(path, limit=1).items == task.items[:1]
    assert load_task(path, limit=9).items == task.items


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"task.jsonl:2 is not JSON"),
        ("[1]", r"task.jsonl:2 is not a JSON object"),
        ('{"query": "a", "choices": ["a", "b"]}', r"task.jsonl:2 has no field 'gold'; wanted \{"),
        ('{"query": " ", "choices": ["a", "b"], "gold": 0}', r"task.jsonl:2 has no text in 'query'; got ' '"),
        ('{"query": "a", "choices": ["a"], "gold": 0}', r"task.jsonl:2 has malformed 'choices'; wanted a list"),
        ('{"query": "a", "choices": "ab", "gold": 0}', r"task.jsonl:2 has malformed 'choices'"),
        ('{"query": "a", "choices": ["a", ""], "gold": 0}', r"task.jsonl:2 has malformed 'choices'"),
        ('{"query": "a", "choices": ["a", "b"], "gold": 2}', r"wrong 'gold'; got 2; wanted a whole number from 0 to 1"),
        ('{"query": "a", "choices": ["a", "b"], "gold": -1}', r"task.jsonl:2 has a wrong 'gold'; got -1"),
        ('{"query": "a", "choices": ["a", "b"], "gold": true}', r"task.jsonl:2 has a wrong 'gold'; got True"),
        ('{"query": "a", "choices": ["a", "b"], "gold": "A"}', r"task.jsonl:2 has a wrong 'gold'; got 'A'"),
        ('{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', r"task.jsonl:2 holds half a character"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        load_task(write(tmp_path, GOOD, line))
    assert len(load_task(write(tmp_path, GOOD, line), limit=1)) == 1


def test_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^no task file .*none\.jsonl; check the path$"):
        load_task(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"is a folder; wanted a \.jsonl file"):
        load_task(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl holds no items"):
        load_task(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"latin\.jsonl is not UTF-8 text \(byte 0\)"):
        load_task(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match=r"cannot take 0 items of .*; wanted at least 1"):
        load_task(tmp_path / "empty.jsonl", limit=0)


def test_words_are_right_when_every_token_is_the_most_likely(tmp_path, tiny_model, tiny_tokenizer):
    """Against the argmax of plain logits, token by token; some continuations are made right by asking the model."""
    import json

    from geoquant.evaluate.tasks import answer

    generator = torch.Generator().manual_seed(3)
    items, truth = [], []
    for index in range(12):
        context = "".join(chr(97 + int(k)) for k in torch.randint(0, 26, (6 + index,), generator=generator))
        ids = tiny_tokenizer(f"{context} ", add_special_tokens=False).input_ids
        logits = tiny_model(torch.tensor([ids])).logits[0, -1]
        letters = {chr(97 + k): tiny_tokenizer.convert_tokens_to_ids(chr(97 + k)) for k in range(26)}
        best = max(letters, key=lambda letter: logits[letters[letter]].item())
        items.append({"context": context + "\n", "continuation": best if index % 2 else "q"})
        whole = tiny_tokenizer(f"{context} {items[-1]['continuation']}", add_special_tokens=False).input_ids
        found = tiny_model(torch.tensor([whole])).logits[0].argmax(-1)
        first = len(tiny_tokenizer(context, add_special_tokens=False).input_ids)
        truth.append(all(found[t - 1] == whole[t] for t in range(first, len(whole))))
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    result = answer(tiny_model, tiny_tokenizer, load_task(path))
    assert list(result.correct) == truth
    assert result.accuracy == pytest.approx(sum(truth) / 12)
    assert all(score < 0 for (score,) in result.scores)


@pytest.mark.parametrize("line", ['{"context": "a", "continuation": ""}', '{"continuation": "b"}', '["continuation"]'])
def test_a_malformed_word_item_is_named(tmp_path, line):
    path = tmp_path / "words.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=r"words\.jsonl:1"):
        load_task(path)
