"""The documents against the program: commands parse, snippets compile, examples are valid, links resolve.

What a document shows is never executed here, except the worked example of concepts.md, whose output is compared.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from geoquant.cli import COMMANDS, build_app
from geoquant.data.records import read_records
from geoquant.evaluate.tasks import load_task
from geoquant.recipe import load_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DOOR = {"test", "check", "setup", "help", "--help"}  # words of ./run that are not commands of geoquant

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Fenced:
    """A fenced block of a document: its language and its text."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_in(document: Path, text: str) -> list[Fenced]:
    """All fenced blocks, in order."""
    return [
        Fenced(document, text.count("\n", 0, found.start()) + 1, found[1], found[2]) for found in FENCE.finditer(text)
    ]


def blocks(language: str) -> list[Fenced]:
    """The blocks of one language in all documents."""
    found = [block for document in DOCUMENTS for block in blocks_in(document, document.read_text(encoding="utf-8"))]
    return [block for block in found if block.language == language]


def commands_in(text: str) -> list[list[str]]:
    """The arguments of every call of `geoquant` (or `./run`) in a piece of shell."""
    calls = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        call: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>"):  # what stands behind a pipe or a redirection is not ours
                if call and call[0] in ("geoquant", "./run"):
                    calls.append(call)
                call = []
            else:
                call.append(word)
    return [call[1:] for call in calls if not (call[0] == "./run" and (not call[1:] or call[1] in DOOR))]


def parse_problem(arguments: list[str]) -> str | None:
    """Why the command line would refuse these arguments; None if it would take them."""
    from cyclopts import CycloptsError

    if arguments[:1] in (["--help"], ["--version"], []):
        return None
    if arguments[0] not in COMMANDS:
        return f"no command {arguments[0]!r}"
    if "--help" in arguments:
        return None
    try:
        build_app().parse_args(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return str(error)
    return None


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document."""
    outside = FENCE.sub("", text)
    titles = re.findall(r"^#+ +(.+?) *$", outside, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|`", lambda match: match[1] or "", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def link_problem(document: Path, target: str) -> str | None:
    """Why a link leads nowhere; None for addresses of other hosts, which are not followed."""
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    place = (document.parent / path).resolve() if path else document
    if not place.exists():
        return f"no file {path}"
    if anchor and place.suffix == ".md" and anchor not in anchors(place.read_text(encoding="utf-8")):
        return f"no heading #{anchor}"
    return None


# --- the documents ------------------------------------------------------------------------------------------


def test_every_command_that_a_document_shows_parses():
    shown = [(block, call) for block in blocks("bash") for call in commands_in(block.text)]
    assert len(shown) > 20
    wrong = [f"{block}: geoquant {shlex.join(call)}: {why}" for block, call in shown if (why := parse_problem(call))]
    assert wrong == []


def test_the_how_to_shows_every_command():
    shown = {call[0] for block in blocks("bash") if block.document.stem == "how-to" for call in commands_in(block.text)}
    assert shown == set(COMMANDS)


def test_every_python_block_compiles():
    shown = blocks("python")
    assert len(shown) > 4
    for block in shown:
        compile(block.text, str(block), "exec")


def test_every_example_of_a_record_a_question_or_a_recipe_is_valid(tmp_path):
    examples = blocks("jsonl")
    assert len(examples) > 3
    for block in examples:
        path = tmp_path / "example.jsonl"
        path.write_text(block.text, encoding="utf-8")
        if '"query"' in block.text:
            load_task(path)
        else:
            read_records(path)
    recipes = blocks("toml")
    assert recipes
    for block in recipes:
        path = tmp_path / "recipe.toml"
        path.write_text(block.text, encoding="utf-8")
        load_recipe(path)


def test_every_relative_link_resolves():
    wrong = []
    for document in DOCUMENTS:
        text = FENCE.sub("", document.read_text(encoding="utf-8"))
        wrong += [
            f"{document.name}: {target}: {why}"
            for target in LINK.findall(text)
            if (why := link_problem(document, target))
        ]
    assert wrong == []


def test_the_worked_example_prints_what_the_page_says():
    document = ROOT / "docs" / "concepts.md"
    found = blocks_in(document, document.read_text(encoding="utf-8"))
    pairs = [
        (code, printed) for code, printed in pairwise(found) if (code.language, printed.language) == ("python", "text")
    ]
    assert pairs
    for code, printed in pairs:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code.text, str(code), "exec"), {})
        assert output.getvalue() == printed.text


def test_no_lattice_point_beats_the_worked_example():
    """concepts.md says so of Babai's answer (1, 2)."""
    errors = {
        (a, b): 4.0 * (1.4 - a) ** 2 + 3.6 * (1.4 - a) * (1.4 - b) + (1.4 - b) ** 2
        for a in range(-8, 8)
        for b in range(-8, 8)
    }
    assert min(errors, key=errors.get) == (1, 2)
    assert errors[1, 2] == pytest.approx(0.136)


def test_the_messages_of_the_how_to_are_in_the_program():
    """Its first two words, or three others in a row, stand in the source; values in it are examples."""
    text = (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8")
    table = text.partition("| message | what to do |")[2]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) > 20
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    lost = []
    for message in messages:
        words = message.split()
        pieces = [words[:2], *(words[start : start + 3] for start in range(len(words) - 2))]
        if not any(" ".join(piece) in source for piece in pieces):
            lost.append(message)
    assert lost == []


# --- the checks themselves ----------------------------------------------------------------------------------


def test_a_wrong_command_or_flag_is_noticed():
    calls = commands_in(
        "$X geoquant no\n./run\n./run test -k docs\n./run eval M | head\n"
        "geoquant quantize MODEL \\\n  --bits 4 --out R # note\n"
        "geoquant eval M --wrong && geoquant shrink M > f\n"
    )
    assert calls == [
        ["eval", "M"],
        ["quantize", "MODEL", "--bits", "4", "--out", "R"],
        ["eval", "M", "--wrong"],
        ["shrink", "M"],
    ]
    assert [parse_problem(call) is None for call in calls] == [True, True, False, False]
    assert parse_problem(["quantize", "MODEL"]) is not None  # --out is missing
    assert parse_problem(["quantize", "MODEL", "--out", "R", "--bits", "four"]) is not None


def test_a_dead_link_is_noticed():
    document = ROOT / "docs" / "how-to.md"
    assert link_problem(document, "concepts.md#the-metric") is None
    assert link_problem(document, "https://example.org/nowhere") is None
    assert link_problem(document, "concepts.md#nowhere") == "no heading #nowhere"
    assert link_problem(document, "nowhere.md") == "no file nowhere.md"
    assert link_problem(document, "#run-on-a-gpu") is None
    assert link_problem(document, "#run-on-a-toaster") == "no heading #run-on-a-toaster"
