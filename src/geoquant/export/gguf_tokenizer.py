"""A tokenizer as GGUF metadata: byte-level BPE, and the name llama.cpp has for how it cuts text before merging.

llama.cpp knows pre-tokenizers by name only. We recognise them by what they do, in the tokenizer's own description
(tokenizer.json), and refuse what we do not recognise: a wrong name gives other tokens without any error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from geoquant.errors import UserError

__all__ = ["Vocabulary", "vocabulary"]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# How text is cut -> (name in llama.cpp, whether it takes whole words from the vocabulary before it merges).
KNOWN = {
    ("bytes",): ("gpt-2", False),
    ("digits", "bytes"): ("smollm", False),
    (f"{CONTRACTIONS}|{WORDS}|" + r"\p{N}|" + REST,): ("qwen2", False),
    (f"{CONTRACTIONS}|{WORDS}|" + r"\p{N}{1,3}|" + REST,): ("llama-bpe", True),
}


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a tokenizer. `special`: ids by GGUF's name (bos, eos, unk, pad)."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def vocabulary(tokenizer: object, rows: int) -> Vocabulary:
    """The vocabulary of a Hugging Face tokenizer, padded to the `rows` of the embedding.

    Raises UserError where llama.cpp would cut text otherwise than this tokenizer, or where we cannot tell.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model = description["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(
            "GGUF export knows byte-level BPE tokenizers only",
            got=model.get("type") or type(tokenizer).__name__,
            fix="choose another --format",
        )
    if not model["merges"]:
        raise UserError("a GGUF file needs a tokenizer with merges", fix="choose another --format")
    pre = pre_tokenizer(description)
    added = {entry["id"]: entry for entry in description["added_tokens"]}
    tokens = [f"[PAD{place}]" for place in range(rows)]
    types = [UNUSED] * rows
    for token, place in tokenizer.get_vocab().items():
        if place < rows:  # special tokens beyond the embedding exist in no text of this model
            tokens[place] = token
            types[place] = NORMAL if place not in added else CONTROL if added[place]["special"] else USER_DEFINED
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
    special = {name: getattr(tokenizer, attribute, None) for name, attribute in names.items()}
    some = tokenizer("a")["input_ids"]
    return Vocabulary(
        pre=pre,
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
        special={name: place for name, place in special.items() if place is not None and place < rows},
        add_bos=special["bos"] is not None and some[0] == special["bos"],
        add_eos=special["eos"] is not None and some[-1] == special["eos"],
        chat_template=template if isinstance(template := getattr(tokenizer, "chat_template", None), str) else None,
    )


def pre_tokenizer(description: dict) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text."""
    outer = description["pre_tokenizer"] or {"type": "none"}
    steps = outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]
    cuts = tuple(cut for step in steps if (cut := _cut(step)) is not None)
    name, whole_words = KNOWN.get(cuts, (None, False))
    normalizer = (description["normalizer"] or {"type": None})["type"]
    # Qwen's tokenizer composes accents first; llama.cpp leaves that out, and almost all text is composed already.
    plain = normalizer is None or (name == "qwen2" and normalizer == "NFC")
    if name is None or not plain or bool(description["model"].get("ignore_merges")) != whole_words:
        raise UserError(
            "GGUF export does not know how this tokenizer cuts text",
            got=f"{', '.join(step['type'] for step in steps)}",
            wanted=f"one that llama.cpp calls {', '.join(name for name, _ in KNOWN.values())}",
            fix="choose another --format",
        )
    return name


def _cut(step: dict) -> str | None:
    """What one step of a pre-tokenizer cuts: a key of KNOWN, or None where it only spells bytes."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes" if step["use_regex"] else None
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "?")
    return "?"
