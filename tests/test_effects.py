"""Effects against the changed model run in full, and planted function, memory and overlap found."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import make_tokenizer, tiny_llama
from geoquant.data.records import Canary, Record, Span
from geoquant.data.text import Windows
from geoquant.errors import UserError
from geoquant.evaluate.choices import Item, Task, choices
from geoquant.evaluate.perplexity import difference, perplexity
from geoquant.model.walk import find_blocks, read_weight, site_modules, write_weight
from geoquant.outliers.effects import Material, changed, effect, effects, open_baseline
from geoquant.outliers.interventions import Part, block_of_columns, intervene, largest, parse
from geoquant.outliers.resume import Resume
from geoquant.outliers.taxonomy import labels
from geoquant.privacy.delong import paired_difference
from geoquant.privacy.exposure import exposure
from geoquant.privacy.extraction import extracted_spans
from geoquant.privacy.scoring import score_records
from planted_toy import Planted, make_base, plant

DOWN = "model.layers.1.mlp.down_proj"


def tokens(count=3, length=20, seed=0):
    return torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(seed))


def public(seed=0):
    return Windows(tokens(6, 20, seed), "public", "")


def records(count, seed):
    """Texts of 3 to 40 letters, the first three of each private."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdef "), size=rng.integers(3, 40))) for _ in range(count)]
    return tuple(Record(text, (Span("start", 1, 3),)) for text in texts)


def canaries(count=8):
    rng = np.random.default_rng(5)
    return tuple(
        Record(f"no {i}: {s}", canary=Canary(f"c{i}", 6, 8)) for i, s in enumerate(rng.integers(10, 99, count))
    )


def make(kind: str, seed: int = 0):
    if kind == "llama":
        return tiny_llama(seed, num_hidden_layers=4)
    if kind == "untied":
        return tiny_llama(seed, num_hidden_layers=4, tie_word_embeddings=False)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    settings = {"n_positions": 256, "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=304, n_embd=32, n_layer=4, n_head=4, **settings)).eval()


def by_hand(model, part: Part, intervention, base=None):
    """A second model with the change made in it."""
    other = copy.deepcopy(model)
    module = other.get_submodule(part.site)
    write_weight(module, intervene(read_weight(module), part, intervention, base))
    return other


def sites(model):
    ends = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)][:1]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return [*site_modules(model), *ends, *([] if tied else ["lm_head"])]


@pytest.mark.parametrize("kind", ["llama", "untied", "gpt2"])
def test_every_site_gives_what_the_whole_model_gives(kind):
    model = make(kind)
    base = open_baseline(model, make_tokenizer(), Material(public()))
    names = sites(model)
    assert len(names) == {"llama": 29, "untied": 30, "gpt2": 17}[kind]
    for name in [*names[::4], *names[-2:]]:
        part, done = Part(name), parse("noise@0.5")
        found = effect(base, part, done)
        plain = perplexity(by_hand(model, part, done), public())
        assert found.public.after == pytest.approx(plain.nll, abs=1e-5)
        expected = difference(base.measured.public, plain)
        assert found.public.value == pytest.approx(expected["value"], abs=1e-5)
        assert found.public.se == pytest.approx(expected["se"], abs=1e-5)
        assert found.public.value != 0


def test_records_of_any_length_score_as_in_the_whole_model():
    model, tokenizer = make("llama"), make_tokenizer()
    sides = records(14, 0), records(17, 1)
    material = Material(
        public(),
        *sides,
        canaries=canaries(),
        domain=records(9, 2),
        reference=tuple(score_records(make("llama", 1), tokenizer, side) for side in sides),
        tasks=(
            Task(
                "letters", tuple(Item(r.text[:5] + "x", ("ab", "cde", "f"), i % 3) for i, r in enumerate(sides[0])), ""
            ),
        ),
    )
    base = open_baseline(model, tokenizer, material)
    part, done = largest(DOWN, torch.rand(32, 48, generator=torch.Generator().manual_seed(3)), 0.5), parse("zero")
    found = effect(base, part, done)
    assert (found.part, found.intervention) == (f"{DOWN} top 50%", "zero")
    other = by_hand(model, part, done)
    losses = {}
    for name, side in {"members": sides[0], "nonmembers": sides[1], "domain": material.domain}.items():
        old, new = (score_records(m, tokenizer, side) for m in (model, other))
        losses[name] = [-s.record_sums(s.log_prob) / s.lengths for s in (old, new)]
    change = losses["domain"][1] - losses["domain"][0]
    assert found.domain.value == pytest.approx(change.mean(), abs=1e-5)
    assert found.domain.se == pytest.approx(change.std(ddof=1) / 3, abs=1e-5)
    before, after = ([-losses[name][i] for name in ("members", "nonmembers")] for i in (0, 1))
    expected = paired_difference(before, after)
    assert found.attacks["loss"].difference.value == pytest.approx(expected.value)
    assert found.attacks["loss"].difference.ci == pytest.approx(expected.ci)
    known = [s.record_sums(s.log_prob) / s.lengths for s in material.reference]
    before, after = ([one - ref for one, ref in zip(pair, known)] for pair in (before, after))
    assert found.attacks["reference"].difference.ci == pytest.approx(paired_difference(before, after).ci)
    gaps = [one[0].mean() - one[1].mean() for one in (before, after)]
    assert (found.gap.before, found.gap.after) == pytest.approx([abs(gap) for gap in gaps], abs=1e-5)
    spans = [extracted_spans(score_records(m, tokenizer, sides[0]), sides[0]) for m in (model, other)]
    assert [found.extraction.before, found.extraction.after] == [np.mean([hit for *_, hit in s]) for s in spans]
    bits = [exposure(score_records(m, tokenizer, canaries()), canaries()).mean_bits for m in (model, other)]
    assert [found.exposure.before, found.exposure.after] == pytest.approx(bits, abs=1e-4)
    assert bits[0] != bits[1]
    right = [choices(m, tokenizer, material.tasks[0]).accuracy for m in (model, other)]
    assert [found.tasks["letters"].before, found.tasks["letters"].after] == right
    assert found.seconds > 0


def test_blocks_before_the_change_do_not_run():
    model = make("llama")
    base = open_baseline(model, make_tokenizer(), Material(public(), records(12, 0), records(12, 1)))
    ran = Counter()
    _, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.update([index]))
    effect(base, Part("model.layers.2.self_attn.q_proj"), parse("zero"))
    assert set(ran) == {2, 3}
    ran.clear()
    effect(base, Part("model.embed_tokens"), parse("noise@0.1"))
    assert set(ran) == {0, 1, 2, 3}


def test_models_in_half_precision_resume_too():
    model = make("llama").to(torch.bfloat16)
    base = open_baseline(model, make_tokenizer(), Material(public()))
    assert base.resume.kept
    part = Part("model.layers.3.mlp.up_proj")
    found = effect(base, part, parse("zero"))
    with changed(model, part, parse("zero")):
        assert found.public.after == pytest.approx(perplexity(model, public()).nll, abs=1e-6)


@pytest.mark.parametrize("share", [0.6, 0.3, 0.0])
def test_memory_is_bounded_and_changes_nothing(share):
    model = make("llama")
    plenty, few = Resume(model), Resume(model)
    with plenty.recording(), torch.no_grad():
        perplexity(model, public())
    few.memory = int(share * plenty.bytes)
    assert plenty.stride == 1
    with few.recording(), torch.no_grad():
        perplexity(model, public())
    assert few.stride > 1
    assert few.bytes <= few.memory or few.stride >= 4
    with few.starting_at(3):
        assert perplexity(model, public()).nll == pytest.approx(perplexity(model, public(0)).nll, abs=1e-7)


def test_batches_that_were_not_kept_run_in_full():
    model = make("llama")
    resume = Resume(model)
    with resume.recording(), torch.no_grad():
        model.base_model(tokens())
        model.base_model(tokens(seed=4), attention_mask=torch.ones(3, 20))
    other, mask = tokens(seed=1), torch.ones(3, 20, dtype=torch.int64)
    mask[:, :3] = 0
    with torch.no_grad():
        expected = model(other).logits, model(tokens(), attention_mask=mask).logits
        with resume.starting_at(2):
            found = model(other).logits, model(tokens(), attention_mask=mask).logits
    assert len(resume.kept) == 1
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_a_model_whose_blocks_share_more_than_their_states_is_run_in_full():
    model = make("llama")
    _, blocks = find_blocks(model)
    side = []
    blocks[0].mlp.register_forward_hook(lambda _, __, output: side.append(output))
    blocks[3].register_forward_hook(lambda _, __, output: output + side[-1][: len(output), : output.shape[1]])
    base = open_baseline(model, make_tokenizer(), Material(public()))
    assert not base.resume.kept
    found = effect(base, Part(DOWN), parse("zero"))
    with changed(model, Part(DOWN), parse("zero")):
        assert found.public.after == pytest.approx(perplexity(model, public()).nll, abs=1e-6)


def grow(_, args):
    args[0].mul_(1.3)


def test_blocks_that_write_to_their_input_spoil_nothing():
    model = make("llama")
    for block in find_blocks(model)[1]:
        block.input_layernorm.register_forward_pre_hook(grow)
    base = open_baseline(model, make_tokenizer(), Material(public()))
    assert base.resume.kept
    part = Part("model.layers.2.self_attn.q_proj")
    for _ in range(2):
        found = effect(base, part, parse("zero"))
        assert found.public.after == pytest.approx(
            perplexity(by_hand(model, part, parse("zero")), public()).nll, abs=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_whatever_happens(dtype):
    model = make("llama").to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    parts = (block_of_columns(DOWN, 3, 9), Part("model.embed_tokens"))

    def same():
        now = model.state_dict()
        return all(torch.equal(now[n], before[n]) and now[n].data_ptr() == places[n] for n in before)

    with changed(model, parts, parse("quantize@2")) as first:
        assert first == 0
        assert not same()
        now = model.get_submodule(DOWN).weight
        assert torch.equal(now[:, 9:], before[f"{DOWN}.weight"][:, 9:])
        assert not torch.equal(now[:, 3:9], before[f"{DOWN}.weight"][:, 3:9])
    assert same()
    with pytest.raises(KeyboardInterrupt), changed(model, parts, parse("zero")):
        raise KeyboardInterrupt
    assert same()
    # The second part cannot be changed; the first must not stay so.
    with (
        pytest.raises(ValueError, match="indices"),
        changed(model, [parts[0], block_of_columns(DOWN.replace("1", "2"), 0, 99)], parse("zero")),
    ):
        pass
    assert same()
    base = open_baseline(model, make_tokenizer(), Material(public()))
    with pytest.raises(UserError, match="needs a base"):
        effect(base, Part(DOWN), parse("revert"))
    effect(base, Part(DOWN), parse("zero"))
    assert same()
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])


def test_several_parts_are_changed_together():
    model = make("llama")
    base = open_baseline(model, make_tokenizer(), Material(public()))
    parts = (block_of_columns(DOWN, 0, 20), Part("model.layers.3.self_attn.o_proj"))
    found = effect(base, parts, parse("zero"), label="both")
    other = by_hand(by_hand(model, parts[0], parse("zero")), parts[1], parse("zero"))
    assert found.part == "both"
    assert found.public.after == pytest.approx(perplexity(other, public()).nll, abs=1e-5)
    with pytest.raises(ValueError, match="one part of each site"):
        effect(base, (parts[0], parts[0]), parse("zero"))


def test_a_destroyed_model_is_an_effect():
    model = make("llama")
    base = open_baseline(model, make_tokenizer(), Material(public(), records(12, 0), records(12, 1)))
    found = effect(base, Part(DOWN), parse("revert"), base=lambda _: torch.full((32, 48), math.nan))
    assert found.public.value == math.inf
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (kept["public"]["value"], kept["public"]["p"], kept["part"]) == (None, 0, DOWN)
    assert not found.attacks
    assert labels([found])[0].name == "functional"


def test_what_is_asked_wrongly():
    model = make("llama")
    with pytest.raises(UserError, match="both sides; got 3 members, 0 non-members"):
        open_baseline(model, make_tokenizer(), Material(public(), records(3, 0)))
    base = open_baseline(model, make_tokenizer(), Material(public()))
    with pytest.raises(
        UserError, match=r"no site .*layers\.1\.mlp\.down.*did you mean 'model\.layers\.1\.mlp\.down_proj'"
    ):
        effect(base, Part("model.layers.1.mlp.down"), parse("zero"))
    write_weight(model.get_submodule(DOWN), torch.full((32, 48), math.nan))
    with pytest.raises(UserError, match="no probability"):
        open_baseline(model, make_tokenizer(), Material(public()))


@pytest.fixture(scope="session")
def base_of_the_planted():
    return make_base()


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_function_memory_and_overlap_are_found(base_of_the_planted, seed):
    """Columns trained alone on a dialect, on records, on both, and noise, are labelled by reverting them.

    Observed over seeds 0 to 16, at the level 0.05: all of 17 functional, 17 sensitive and 17 overlapping blocks, 17
    blocks of noise and 68 untouched ones got their label. Sizes and lengths of training were chosen on seeds 0 to 7; on
    the 9 others nothing was missed either, so that a miss of one kind has a probability of at most 0.28 (95%). Power is
    that of the records: in a first form with 20 + 20 members 3 of 6 memories were called neither.
    """
    planted: Planted = plant(base_of_the_planted, seed)
    base = open_baseline(planted.model, make_tokenizer(), planted.material)
    found = effects(
        base,
        [(part, parse("revert")) for part, _ in planted.parts],
        base=lambda name: read_weight(base_of_the_planted.get_submodule(name)),
    )
    assert [label.name for label in labels(found)] == [role for _, role in planted.parts]
    untouched = [one for one in found if one.public.value == 0]
    assert len(untouched) == 4
    assert all(one.attacks["reference"].p == 1 for one in untouched)
