"""The pass back through a model with several texts, against autograd of the whole model."""

from __future__ import annotations

import pytest
import torch

from geoquant.model.walk import read_weight, site_modules, walk
from geoquant.observe.backward import backward
from geoquant.observe.texts import Sequences, padded
from geoquant.outliers.appraise import Collected
from geoquant.outliers.statistics import total


def sequences(seed: int, lengths: list[int]) -> list[list[int]]:
    """Random tokens of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


def gradients(model, texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Of the loss summed over all tokens of all texts, one text at a time, by plain autograd."""
    model.zero_grad()
    for text in texts:
        ids = torch.tensor([text])
        model(ids, labels=ids).loss.mul(len(text) - 1).backward()
    return {name: module.weight.grad.clone() for name, module in site_modules(model).items()}


def test_gradients_of_padded_texts_are_those_of_each_text_alone(tiny_model):
    texts = {"public": sequences(0, [24] * 4), "private": sequences(1, [5, 17, 9, 30])}
    blocks = walk(tiny_model, torch.tensor([texts["public"][0]]))
    collected = Collected(2)
    given = {name: padded(text, 1) for name, text in texts.items()}
    names = [block.index for block in backward(tiny_model, blocks, given, collected.see)]
    assert names == [1, 0]
    for name, text in texts.items():
        expected = gradients(tiny_model, text)
        for site, gradient in expected.items():
            found = total(collected.of(site, name))
            assert found.tokens == sum(map(len, text))
            # What enters a block is kept in bfloat16: 0.4% of every value.
            assert (found.gradient - gradient).norm() < 0.02 * gradient.norm()


def test_statistics_of_a_site_are_those_of_its_tokens(tiny_model):
    texts = sequences(2, [12, 12])
    blocks = walk(tiny_model, torch.tensor([texts[0]]))
    seen = []
    for _ in backward(tiny_model, blocks, {"public": padded(texts, 1)}, lambda *one: seen.append(one)):
        pass
    assert len(seen) == len(site_modules(tiny_model))
    for text, batch, site, x, g in seen:
        rows, columns = read_weight(site_modules(tiny_model)[site]).shape
        assert (text, batch, x.shape, g.shape) == ("public", 0, (24, columns), (24, rows))


def test_what_follows_a_text_changes_nothing_in_it(tiny_model):
    one = sequences(3, [7, 20])
    blocks = walk(tiny_model, torch.tensor([one[1]]))
    results = []
    for filler in (1, 77):
        collected = Collected(1)
        for _ in backward(tiny_model, blocks, {"public": padded(one, filler)}, collected.see):
            pass
        results.append({site: total(collected.of(site, "public")) for site in site_modules(tiny_model)})
    for site in results[0]:
        assert torch.equal(results[0][site].fisher, results[1][site].fisher)
        assert torch.equal(results[0][site].hessian, results[1][site].hessian)


def test_sequences_too_short_to_predict_anything_are_refused():
    with pytest.raises(ValueError, match="at least two tokens"):
        padded([[1, 2], [3]], 0)


def test_padding_sorts_and_counts():
    found = padded([[1, 2, 3], [4, 5]], 9)
    assert isinstance(found, Sequences)
    assert found.tokens.tolist() == [[4, 5, 9], [1, 2, 3]]
    assert found.count == 5


def test_every_part_of_a_text_gets_as_many_sequences_of_all_lengths():
    given = [[1] * length for length in (*range(2, 14), *range(2, 14))]
    found = padded(given, 0, parts=4)
    assert sorted(found.lengths.tolist()) == sorted(map(len, given))
    batches = found.lengths.view(-1, found.batch)
    assert len(batches) % 4 == 0
    assert (batches.sum(1) - 7.5 * found.batch).abs().max() <= found.batch


def test_long_sequences_go_through_in_pairs():
    assert padded([[1] * 600] * 8, 0, parts=4).batch == 2
    assert padded([[1] * 600] * 4, 0, parts=4).batch == 1
    assert padded([[1] * 600] * 5, 0, parts=4).batch is None


def test_sites_that_read_the_same_share_what_is_known_of_it(tiny_model):
    blocks = walk(tiny_model, torch.tensor([[1, 2, 3]]))
    collected = Collected(2)
    text = padded(sequences(4, [7, 20, 9, 11]), 1, parts=2)
    for block in backward(tiny_model, blocks, {"public": text}, collected.see):
        of = {site.name: total(collected.of(site.name, "public")) for site in block.sites}
        q, k = (of[site.name] for site in block.sites[:2])
        assert q.hessian is k.hessian
        assert q.histogram is k.histogram
        assert q.weighted is not k.weighted
        collected.clear()
