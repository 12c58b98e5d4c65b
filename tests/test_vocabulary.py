"""Embedding and head on the lattice: their metric against autograd and brute force, and their way into the file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import make_tokenizer, tiny_llama
from geoquant.export.reader import CodedEmbedding, CodedLinear, TiedHead
from geoquant.model.vocabulary import EMBEDDING, HEAD, TIED, ends, head_weight, repeated, vocabulary, vocabulary_rows
from geoquant.model.walk import walk
from geoquant.observe.gradient import token_energies
from geoquant.observe.stream import open_stream
from geoquant.observe.vocabulary import FLOOR, VocabularyMoments, vocabulary_metric
from geoquant.pipeline import quantize
from geoquant.plan import estimate
from geoquant.recipe import checked


def observed(model, tokens, share=1.0):
    """The moments of one backward pass, in float32."""
    blocks = walk(model, tokens[:1, :8])
    stream = open_stream(model, tokens)
    found = token_energies(model, blocks, stream, tokens, compute=torch.float32, share=share, vocabulary=True)
    return found.vocabulary


@pytest.fixture
def tokens():
    return torch.randint(3, 300, (8, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("tied", [True, False])
def test_the_moments_are_autograd_s(tied, tokens):
    """`h h^T`, `p (1 - p)` and `g g^T` by plain autograd through the whole model, window by window."""
    model = tiny_llama(tie_word_embeddings=tied)
    found = observed(model, tokens)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    gradient = torch.autograd.grad(loss, embedded)[0].flatten(0, 1)
    p = torch.softmax(logits.detach(), -1).flatten(0, 1)
    h = hidden[:, :-1].detach().flatten(0, 1)
    torch.testing.assert_close(found.embedding.sum(0), gradient.T @ gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.head.sum(0), h.T @ h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.curvature, (p * (1 - p)).sum(0) / tokens.numel(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.predicted, p.sum(0) / tokens.numel(), rtol=1e-4, atol=1e-9)
    assert found.frequency.sum().item() == pytest.approx(1.0)
    assert found.frequency[tokens[0, 0]] == (tokens == tokens[0, 0]).float().mean()


def test_the_last_batch_is_held_out(tokens):
    found = observed(tiny_llama(), tokens)
    assert found.counts.tolist() == [6 * 24, 2 * 24]
    assert observed(tiny_llama(), tokens, share=0.25).counts.tolist() == [2 * 24, 0]


def test_the_head_s_metric_predicts_the_loss(tokens):
    """A small random change of the head costs what the exact second-order form says, summed over rows: the Kronecker
    form with one `E[h h^T]` for all rows is near it.
    """
    model = tiny_llama(tie_word_embeddings=False)
    found = observed(model, tokens)
    hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1).double()
    weight = model.lm_head.weight.detach().double()
    change = 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def divergence(scale):
        before = torch.log_softmax(hidden @ weight.T, -1)
        after = torch.log_softmax(hidden @ (weight + scale * change).T, -1)
        return (before.exp() * (before - after)).sum().item() / tokens.numel()

    quadratic = divergence(1e-3) / 1e-6  # second order: no first-order term in the divergence
    side = found.head.sum(0).double() / found.counts.sum()
    predicted = 0.5 * ((change @ side) * change).sum(1) @ found.curvature.double()
    assert predicted.item() == pytest.approx(quadratic, rel=0.1)


@pytest.mark.parametrize("kind", [EMBEDDING, HEAD, TIED])
def test_the_metric_of_one_role_is_that_role_s_and_of_both_their_sum(kind):
    """Where both roles have the same input side, the Kronecker form is exact."""
    generator = torch.Generator().manual_seed(0)
    side = torch.randn(40, 6, generator=generator)
    side = side.T @ side
    c, p, f = (torch.rand(9, generator=generator) for _ in range(3))
    f = f / f.sum()
    p = p / p.sum()
    counts = torch.tensor([40, 0])
    moments = VocabularyMoments(
        head=torch.stack([side, 0 * side]),
        embedding=torch.stack([3.0 * side, 0 * side]),
        counts=counts,
        curvature=c,
        predicted=p,
        frequency=f,
    )
    hessian, heldout, rows = vocabulary_metric(moments, kind)
    assert heldout is None
    share = (p + f) / 2
    truth = {
        EMBEDDING: share[:, None, None] * 3.0 * side,
        HEAD: c[:, None, None] * side,
        TIED: (c + 3.0 * share)[:, None, None] * side,
    }[kind]
    found = (rows - FLOOR / (1 + FLOOR) * rows.mean())[:, None, None] * hessian
    torch.testing.assert_close(found, truth, rtol=0.02, atol=0.0)


def test_stages_of_tied_and_untied_models():
    tied, untied = (tiny_llama(tie_word_embeddings=flag) for flag in (True, False))
    assert [site.kind for site in vocabulary(tied, 2).sites] == [TIED]
    assert [site.kind for site in vocabulary(untied, 2).sites] == [EMBEDDING, HEAD]
    blocks = (*walk(tied, torch.zeros(1, 4, dtype=torch.int64)), vocabulary(tied, 2))
    assert len(repeated(blocks)) == 2
    assert [stage.name for stage in ends(blocks)] == ["model.embed_tokens"]
    assert ends(repeated(blocks)) == ()
    assert vocabulary_rows(tied) == 304


def test_an_embedding_of_an_unusual_kind_is_left_alone():
    class Scaled(torch.nn.Embedding):
        pass

    model = tiny_llama()
    model.set_input_embeddings(Scaled(304, 32))
    assert vocabulary(model, 2) is None


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    tiny_llama(tie_word_embeddings=request.param).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    recipe = checked({"model": str(folder / "model"), "rate": 5.0, "windows": 8, "window": 32, "evaluation_windows": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "gemm_rate", lambda *_: 1e10)  # timing is not what is tested
        report = quantize(recipe, folder / "run")
    return folder / "run", report, request.param, recipe


def solved(folder, name):
    path = folder / "sites" / f"{name}.safetensors"
    part = load_file(path)
    steps = [
        torch.exp2(part[f"{side}_exponents"].double() / 8).to(torch.bfloat16).double() for side in ("row", "column")
    ]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["sites"])[0]["name"] == name
    return (part["codes"].double() * steps[0][:, None] * steps[1]).float()


def test_the_report_counts_them(run):
    _, report, tied, _ = run
    kinds = [site["kind"] for site in report["sites"] if site["kind"] in (TIED, EMBEDDING, HEAD)]
    assert kinds == ([TIED] if tied else [EMBEDDING, HEAD])
    assert report["size"]["bits_per_weight"] == pytest.approx(5.0, rel=0.01)
    assert report["exports"][0]["verified"]["ok"]
    # Of the original's states the original's head made the logits: nothing else gives a divergence near zero.
    assert 0 <= report["quality"]["kl"]["value"] < 0.1
    # No 16-bit matrix is left: norms and side files are all that is beyond the codes.
    assert report["size"]["linear_bytes"] * 8 < 8 * sum(s["shape"][0] * s["shape"][1] for s in report["sites"])


def test_transformers_reads_them(run):
    folder, _, tied, _ = run
    model = AutoModelForCausalLM.from_pretrained(folder / "coded").eval()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, CodedEmbedding)
    assert isinstance(head, TiedHead if tied else CodedLinear)
    assert embedding.codes.dtype == torch.int8
    truth = solved(folder, "model.embed_tokens")
    index = torch.tensor([[0, 7, 303], [5, 5, 1]])
    torch.testing.assert_close(embedding(index), truth[index], rtol=1e-6, atol=0)
    torch.testing.assert_close(embedding.dequantize(), truth, rtol=1e-6, atol=0)
    matrix = truth if tied else solved(folder, "lm_head")
    torch.testing.assert_close(head_weight(model), matrix, rtol=1e-6, atol=0)
    hidden = torch.randn(2, 3, 32)
    torch.testing.assert_close(head(hidden), hidden @ matrix.T, rtol=1e-4, atol=1e-4)
    # Tying again, copying and generating leave it as it is.
    model.tie_weights()
    again = copy.deepcopy(model)
    assert not tied or again.get_output_embeddings().tied[0] is again.get_input_embeddings()
    assert again.generate(index[:1], max_new_tokens=3, do_sample=False).shape == (1, 6)
    torch.testing.assert_close(again(index).logits, model(index).logits)


def test_rows_beyond_a_byte_are_looked_up_exactly():
    """Codes far beyond int8 in a few rows, and in most of them."""
    generator = torch.Generator().manual_seed(2)
    for share, kind in ((0.002, torch.int8), (0.5, torch.int16)):
        codes = torch.randint(-100, 100, (50, 16), generator=generator, dtype=torch.int32)
        far = torch.rand(codes.shape, generator=generator) < share
        far[3, 5] = far[3, 9] = True
        codes[far] *= 400
        codes[7, 2] = 70_000 if kind == torch.int16 else 1000
        entry = {"shape": [50, 16], "sizes": [1, 0, 1], "bases": [-16, -8], "columns": "e"}
        module = CodedEmbedding("e", entry, torch.nn.Embedding(50, 16))
        module.row_steps.copy_(torch.randint(0, 9, (50,), generator=generator))
        rows = module.row_steps.to(torch.int32) - 16
        columns = torch.randint(0, 9, (16,), generator=generator, dtype=torch.int32)
        module.unpack(codes, columns, torch.device("cpu"))
        assert module.codes.dtype == kind
        assert len(module.overflow) > 0
        scale = [torch.exp2(x.double() / 8).to(torch.bfloat16).double() for x in (rows, columns - 8)]
        truth = (codes.double() * scale[0][:, None] * scale[1]).float()
        index = torch.tensor([3, 7, 0, 3, 49])
        torch.testing.assert_close(module(index), truth[index], rtol=1e-6, atol=0)
        torch.testing.assert_close(module.dequantize(), truth, rtol=1e-6, atol=0)
        x = torch.randn(4, 16, generator=generator)
        torch.testing.assert_close(module.project(x), x @ truth.T, rtol=1e-4, atol=1e-2)


def test_without_them_the_file_keeps_sixteen_bits(run, tmp_path):
    _, report, _, recipe = run
    plain = quantize(recipe.model_copy(update={"embeddings": False, "verify": False}), tmp_path / "run")
    assert not any(site["kind"] in (TIED, EMBEDDING, HEAD) for site in plain["sites"])
    assert plain["size"]["total_bytes"] > report["size"]["total_bytes"]


def test_a_lost_embedding_is_solved_again_to_the_same_bits(run, tmp_path):
    import shutil

    folder, _, _, recipe = run
    shutil.copytree(folder, tmp_path / "run")
    name = "model.embed_tokens.safetensors"
    (tmp_path / "run" / "sites" / name).unlink()
    quantize(recipe, tmp_path / "run", resume=True)
    one, other = (load_file(where / "sites" / name) for where in (folder, tmp_path / "run"))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=0, atol=0)
