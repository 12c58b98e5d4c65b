"""UTF-8 files of the user, and JSON lines in them: every mistake is named by file, in a line by file:line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from geoquant.errors import UserError

__all__ = ["check_encodable", "json_lines", "read_utf8"]


def read_utf8(path: Path, kind: str, wanted: str) -> str:
    """The characters of a file without its byte order mark. `kind`: what it is, `wanted`: for whom gave a folder."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no {kind} file {path}", fix=_nearest(path)) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", wanted=wanted) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})", fix="convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _nearest(path: Path) -> str:
    """What to do about a file that is not there."""
    folder = path.parent
    try:
        close = get_close_matches(path.name, [one.name for one in folder.iterdir()], n=1)
    except OSError:
        return f"there is no folder {folder} either"
    return f"did you mean {folder / close[0]}?" if close else "check the path"


def json_lines(path: Path, text: str, wanted: str) -> Iterator[tuple[str, object]]:
    """(file:line, value) of every line of `text` that is not blank. `wanted`: what a line should look like.

    Raises UserError at the first line that is not JSON.
    """
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg}", wanted=wanted) from None
        except RecursionError:
            raise UserError(f"{where} is not JSON: nested too deeply", wanted=wanted) from None
        except ValueError:  # Python reads no integer of more than 4300 digits
            raise UserError(f"{where} holds a number of too many digits", wanted=wanted) from None
        yield where, value


def check_encodable(where: str, text: str) -> None:
    """Raise UserError for half a surrogate pair: JSON can escape one, but no tokenizer or hash can take it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate)", fix="remove it") from None
