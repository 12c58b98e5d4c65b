"""Text files to token windows, by the windows protocol that every perplexity of this project follows.

Tokenise the whole text without special tokens; cut consecutive non-overlapping windows from the start; a
window is `length` tokens, the first of which is BOS if and only if the tokenizer adds one by default.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from geoquant.errors import UserError

__all__ = ["Windows", "builtin_text", "read_text", "windows"]


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
    try:
        raw = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no text file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", wanted="a .txt or .jsonl file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})", fix="convert it to UTF-8") from None
    if path.suffix != ".jsonl":
        return raw
    texts = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not JSON: {error.msg}") from None
        except (KeyError, TypeError):
            raise UserError(
                f"{path}:{number} has no field 'text'", wanted='{"text": "..."} on every line'
            ) from None
    return "\n\n".join(texts)


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
    # A tokenizer warns about texts longer than the model; windows are cut afterwards, so the warning is noise.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
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
