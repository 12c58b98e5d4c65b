"""What every page of ours is made of: one HTML file that needs nothing else.

A page carries its own style, figures and (tiny, optional) script; a Content-Security-Policy that names their hashes
keeps everything else out, so a hostile model name can neither load nor run anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from geoquant import runs
from geoquant.report import figures
from geoquant.report.words import attack_label, p_value

__all__ = ["fingerprint", "finite", "rendered", "write_page"]


def finite(value: object) -> object:
    """The same value with NaN and infinities as None, which JSON has and they are not."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(report: dict) -> str:
    """SHA-256 of the JSON file exactly as `write_page` writes it: what a signature on the page refers to."""
    text = json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def breakable(name: str) -> Markup:
    """A dotted name that may be broken after its dots, and copies without marks."""
    return Markup(".<wbr>").join(name.split("."))


def code(text: str) -> Markup:
    """Text with `backticks` as code elements."""
    pieces = [escape(piece) for piece in text.split("`")]
    return Markup("").join(Markup("<code>") + p + Markup("</code>") if i % 2 else p for i, p in enumerate(pieces))


def tight(sentence: str) -> str:
    """The sentence with no line break between a number and its unit, nor around an arrow."""
    return re.sub(r"(?<=\d) (?=[kMGT]B)| (?=→)|(?<=→) ", "\u00a0", sentence)


@cache
def _part(name: str) -> str:
    return resources.files("geoquant.report").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_part)
    )
    environment.globals.update(
        {name: getattr(figures, name) for name in ("cell_axis", "dot_interval", "level_bar")},
        attack_label=attack_label,
    )
    environment.filters.update(
        change=figures.change,
        change_error=figures.change_error,
        number=figures.number,
        fixed=figures.plain_number,
        percent=figures.percent,
        spread=figures.spread,
        bytes=figures.size,
        breakable=breakable,
        code=code,
        tight=tight,
        p_value=p_value,
    )
    return environment


def rendered(template: str, *, scripts: tuple[str, ...] = ("copy.js",), **values: object) -> str:
    """The page that a template of this folder makes of the values, with style and scripts in it."""
    style, script = _part("style.css"), "\n".join(map(_part, scripts))
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),
            script=Markup(script),
            style_hash=_csp_hash(style),
            script_hash=_csp_hash(script),
            **values,
        )
    )


def write_page(folder: Path, name: str, page: str, report: dict) -> tuple[Path, Path]:
    """Write NAME.json and NAME.html, each by rename of a complete file."""
    runs.write_json(folder / f"{name}.json", finite(report))
    runs.atomic_write(folder / f"{name}.html", lambda partial: partial.write_text(page, encoding="utf-8") and None)
    return folder / f"{name}.json", folder / f"{name}.html"
