"""Prompts scored in one pass against an attacker who types them into stock greedy generation and reads the text."""

from __future__ import annotations

import pytest
import torch

from geoquant.data.domains import DOMAINS
from geoquant.data.private import PRIVATE, make_records
from geoquant.data.records import Record, Span
from geoquant.errors import UserError
from geoquant.privacy.prompts import GENERAL, TEMPLATES, WORDS, make_prompts, prompted, prompted_extraction
from geoquant.privacy.scoring import score_records


def record(text: str, **values: str) -> Record:
    return Record(text, tuple(Span(kind, text.index(v), text.index(v) + len(v)) for kind, v in values.items()))


MEMBERS = [
    record("Ann Lee <ann47@x.org> asked.", name="Ann Lee", email="ann47@x.org"),
    record("Name: Bob Ek\nPhone number: 5550133\nOk", name="Bob Ek", phone="5550133"),
    record("The zodiac sign of Eve is aries, or so.", name="Eve", zodiac_sign="aries"),
    record("It is said that Kim won 340 pears.", name="Kim", note="340 pears"),  # in no prompt's form
]
NONMEMBERS = [
    record("Zed Orr <qq81@y.net> wrote.", name="Zed Orr", email="qq81@y.net"),
    record("Name: Flo\nPhone number: 0442907\nOk", name="Flo", phone="0442907"),
]


def blank_tokenizer():
    """Byte-level BPE that joins a blank with "a" or "b" behind it, as real tokenizers join it with words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{symbol: 2 + index for index, symbol in enumerate(alphabet)}}
    vocab |= {"Ġa": len(vocab), "Ġb": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>")


@pytest.fixture(scope="module", params=["bytes", "blanks joined"])
def trained(request, tiny_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from geoquant.privacy.finetune import finetune

    joined = request.param == "blanks joined"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = blank_tokenizer() if joined else AutoTokenizer.from_pretrained(tiny_model_dir)
    finetune(model, tokenizer, MEMBERS, epochs=60, lr=1e-2, batch=4, seed=0)
    return model, tokenizer, joined


def written(model, tokenizer, question: str, length: int) -> str:
    """What greedy generation writes behind the question."""
    ids = torch.tensor([tokenizer(question, add_special_tokens=False).input_ids])
    output = model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=1)
    return tokenizer.decode(output[0, ids.shape[1] :])


def test_one_pass_decides_what_an_attacker_reads(trained):
    """Where a blank belongs to the value's first token the attacker's question ends before it, else behind it."""
    model, tokenizer, joined = trained
    for side in (MEMBERS, NONMEMBERS):
        prompts = make_prompts(side)
        scores = score_records(model, tokenizer, [prompt.record for prompt in prompts])
        wanted: dict[tuple[int, Span], bool] = {}
        for prompt in prompts:
            (span,) = prompt.record.fields
            value, question = prompt.record.value(span), prompt.record.text[: span.start]
            blank = " " if joined and question.endswith(" ") and value[0] in "ab" else ""
            text = written(model, tokenizer, question.removesuffix(blank), len(value) + len(blank))
            key = prompt.source, prompt.span
            wanted[key] = wanted.get(key, False) or text.startswith(blank + value)
        found = {(prompt.source, prompt.span): tried.extracted for prompt, tried in prompted(scores, prompts)}
        assert found == wanted
        if side is MEMBERS:
            kinds = {side[source].fields[1].kind: hit for (source, _), hit in found.items()}
            assert kinds == {"email": True, "phone": True, "zodiac_sign": True, "note": False}


def test_rates_by_kind_with_a_control(trained):
    model, tokenizer, _ = trained
    sides = [make_prompts(side) for side in (MEMBERS, NONMEMBERS)]
    scores = [score_records(model, tokenizer, [prompt.record for prompt in side]) for side in sides]
    results = {part.kind: part for part in prompted_extraction(*scores, *sides)}
    assert set(results) == {"all", "email", "phone", "zodiac_sign", "note"}
    everything, email = results["all"], results["email"]
    assert (everything.spans, everything.extracted, everything.control_spans) == (4, 3, 2)
    assert (everything.control_extracted, everything.sampled["1"] >= 2) == (0, True)
    assert (email.spans, email.extracted, email.control_spans) == (1, 1, 1)
    assert (results["note"].extracted, results["note"].control_spans) == (0, 0)


def test_the_best_prompt_is_told(trained):
    model, tokenizer, _ = trained
    prompts = make_prompts(MEMBERS[:1])
    scores = score_records(model, tokenizer, [prompt.record for prompt in prompts])
    ((best, tried),) = prompted(scores, prompts)
    assert best.record.text == "Ann Lee <ann47@x.org"
    alone = [prompted(score_records(model, tokenizer, [p.record]), [p])[0][1] for p in prompts]
    assert tried.samples == pytest.approx(min(one.samples for one in alone), rel=1e-3)
    assert tried.extracted == any(one.extracted for one in alone)


def test_every_prompt_holds_the_name_and_ends_with_the_value():
    pool = make_records(30, 1)
    prompts = make_prompts(pool)
    for prompt in prompts:
        own, (span,) = pool[prompt.source], prompt.record.fields
        name = next(own.value(field) for field in own.fields if field.kind == "name")
        value = own.value(prompt.span)
        assert name in prompt.record.text[: span.start]
        assert (prompt.record.value(span), span.end, span.kind) == (value, len(prompt.record.text), prompt.span.kind)
        assert not any(quote in prompt.record.text for quote in "«»")
        # Nothing of the record but the name and the value: the attacker has not seen it.
        assert not any(own.value(field) in prompt.record.text for field in own.fields if field.kind == "note") or (
            span.kind == "note"
        )
    asked = {(prompt.source, prompt.span) for prompt in prompts}
    assert asked == {(i, field) for i, own in enumerate(pool) for field in own.fields if field.kind != "name"}
    assert len({prompt.record.text for prompt in prompts}) == len(prompts)


def test_records_without_a_name_and_repeated_values():
    twice = record("Ann, 5, 5, id 5", name="Ann", phone="5")
    twice = Record(twice.text, (*twice.fields, Span("phone", 8, 9), Span("id", 14, 15), Span("name", 0, 3)))
    assert make_prompts([Record("call 5", (Span("phone", 5, 6),))]) == ()
    kinds = [prompt.span for prompt in make_prompts([Record("x"), twice])]
    assert set(kinds) == {Span("phone", 5, 6), Span("id", 14, 15)}
    assert {prompt.source for prompt in make_prompts([Record("x"), twice])} == {1}
    assert [p.record.text for p in make_prompts([twice], identity="id")][:1] == ["The name of 5 is Ann"]


def test_an_unknown_kind_is_called_by_its_own_words():
    odd = record("Ann: AB+", name="Ann", **{"blood-group_type": "AB+"})
    assert [prompt.record.text for prompt in make_prompts([odd])] == [
        "The blood group type of Ann is AB+",
        "Name: Ann\nBlood group type: AB+",
    ]


def test_made_kinds_are_all_known():
    """Every kind that the makers produce has a word that fits it, and every word and form its kind."""
    kinds = {*PRIVATE, *(kind for domain in DOMAINS.values() for kind in domain.private.values())} - {"name"}
    plain = {"note", "diagnosis", "medication", "password", "hostname"}
    assert kinds - plain <= set(WORDS)
    for template in (*GENERAL, *(one for forms in TEMPLATES.values() for one in forms)):
        assert template.endswith("«value»")
        assert template.count("«name»") == 1
    assert set(TEMPLATES) <= kinds | set(WORDS)


def test_scores_of_other_prompts_are_refused(tiny_model, tiny_tokenizer):
    prompts = make_prompts(MEMBERS)
    scores = score_records(tiny_model, tiny_tokenizer, [prompts[0].record])
    with pytest.raises(UserError, match="do not belong together"):
        prompted(scores, prompts)


def test_values_that_were_cut_off_are_not_counted(tiny_model, tiny_tokenizer):
    prompts = make_prompts(MEMBERS[:1])
    scores = score_records(tiny_model, tiny_tokenizer, [prompt.record for prompt in prompts], max_tokens=12)
    assert prompted(scores, prompts) == []
    assert prompted_extraction(scores, scores, prompts, prompts) == ()
