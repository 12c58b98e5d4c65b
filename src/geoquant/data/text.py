"""Text files to token windows, by the windows protocol that every perplexity of this project follows.

Tokenise the whole text without special tokens; cut consecutive non-overlapping windows from the start; a
window is `length` tokens, the first of which is BOS if and only if the tokenizer adds one by default.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from geoquant.data.jsonl import check_encodable, json_lines, read_utf8
from geoquant.errors import UserError

__all__ = ["Windows", "adds_bos", "builtin_text", "digit_tokens", "read_text", "windows"]

SHAPE = '{"text": "..."} on every line'


@dataclass(frozen=True)
class Windows:
    """Token windows (n, length) int64 and where they came from."""

    tokens: Int[Tensor, "n length"]
    source: str
    sha256: str

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def scored(self) -> int:
        """Tokens that a perplexity over these windows predicts: all but the first of each."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


def builtin_text() -> str:
    """Real English prose that every Python carries: the language reference behind `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """The text of a `.txt` file, or of the `text` fields of a `.jsonl` file joined by blank lines."""
    path = Path(path)
    raw = read_utf8(path, "text", "a .txt or .jsonl file")
    if path.suffix != ".jsonl":
        return raw
    return "\n\n".join(_text_field(where, item) for where, item in json_lines(path, raw, SHAPE))


def _text_field(where: str, item: object) -> str:
    """The `text` of one line; `where` is file:line."""
    text = item.get("text") if isinstance(item, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where} has no text in a field 'text'", wanted=SHAPE)
    check_encodable(where, text)
    return text


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts a BOS token first by default."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def windows(
    tokenizer, text: str, *, length: int, count: int | None = None, source: str = "text", skip: int = 0
) -> Windows:
    """The first `count` windows (all that fit, when None) after leaving out the first `skip`.

    Raises UserError when the text is too short, saying how many tokens are needed.
    """
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    body = length - len(bos)
    if length < 2:
        raise UserError(f"a window of {length} tokens predicts nothing", wanted="at least 2 tokens")
    if count is not None and count < 1:
        raise UserError(f"cannot cut {count} windows from {source}", wanted="at least 1")
    ids = _first_tokens(tokenizer, text, None if count is None else (skip + count) * body)
    available = len(ids) // body - skip
    if count is None:
        count = available
    if available < count or count < 1:
        needed = (max(count, 1) + skip) * body
        raise UserError(
            f"{source} is too short: it has {len(ids)} tokens",
            wanted=f"at least {needed} ({max(count, 1) + skip} windows of {body})",
            fix="give a longer text, or fewer or shorter windows",
        )
    start = skip * body
    tokens = torch.tensor(ids[start : start + count * body], dtype=torch.int64).view(count, body)
    if bos:
        tokens = torch.cat([torch.full((count, 1), bos[0]), tokens], dim=1)
    return Windows(tokens, source, hashlib.sha256(text.encode()).hexdigest())


def _first_tokens(tokenizer, text: str, needed: int | None) -> list[int]:
    """At least the first `needed` tokens of the whole text's (all, when None).

    A tokenizer decides word by word, so a prefix that ends well behind the last token needed gives the same
    tokens; a megabyte of text would take a quarter of a gigabyte to tokenise.
    """
    margin = 64
    characters = len(text) if needed is None else 8 * (needed + margin)
    while True:
        # A tokenizer warns about texts longer than the model; windows are cut afterwards, so the warning is noise.
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        if characters >= len(text) or len(ids) >= needed + margin:
            return ids
        characters *= 2


def digit_tokens(tokenizer) -> Int[Tensor, 10] | None:
    """Ids of the tokens 0..9, or None when the tokenizer merges neighbouring digits."""
    ids = tokenizer("x0918273645", add_special_tokens=False).input_ids[-10:]
    pieces = [tokenizer.decode([token]).strip() for token in ids]
    if pieces != list("0918273645"):
        return None
    return torch.tensor([ids[pieces.index(digit)] for digit in "0123456789"])
