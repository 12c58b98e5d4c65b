"""The command line: one file per command, and the one place that turns outcomes into exit codes.

0 done; 1 a bug (traceback); 2 something the user can mend (one line); 130 interrupted; 141 the reader of
stdout went away. A command is imported when it is called, torch when it works; the overview needs neither,
nor the parser.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

from geoquant import __version__
from geoquant.errors import UserError

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

__all__ = ["COMMANDS", "build_app", "main", "overview"]

# command -> (module:function, its line in the overview)
COMMANDS = {
    "demo": ("demo:demo", "the whole tour on a small model, about nine minutes"),
    "quantize": ("quantize:quantize", "compress a model, measure quality and leakage, export, report"),
    "plan": ("plan:plan", "the same without doing it; or the best choice within budgets"),
    "tune": ("tune:tune", "search recipes: each compressed, measured and audited, until goals are met"),
    "eval": ("evaluate:evaluate", "perplexity, divergence from another model, multiple choice"),
    "audit": ("audit:audit", "what do the weights reveal about their training records?"),
    "analyze": ("analyze:analyze", "which weights matter to which text: scores, errors, nulls, a map"),
    "bench": ("bench:bench", "which score foretells the harm of rounding a layer?"),
    "identify": ("identify:identify", "what are these weights for? changed one group at a time, labelled"),
    "frontier": ("frontier:frontier", "size, quality and leakage of many operating points, the best marked"),
    "records": ("records:records", "make synthetic private records to train on and audit with"),
    "finetune": ("finetune:finetune", "train on records until an attack succeeds, or for some epochs"),
    "export": ("export:export", "one more format from a finished run"),
    "verify": ("verify:verify", "does a stock reader see what was solved?"),
    "explain": ("explain:explain", "what was decided for a layer, and why, in numbers"),
    "compare": ("compare:compare", "several runs side by side"),
    "list": ("list_:list_", "the methods, metrics, orders, formats, attacks, domains and scores there are"),
    "doctor": ("doctor:doctor", "is this machine ready, and what would make it so?"),
}

# What Ctrl-C leaves behind, and how to go on from there.
RESUME = {
    "quantize": "finished sites are kept: add --resume to the same command to go on",
    "demo": "finished steps are kept: run the same command to go on",
    "audit": "with --out, the scores of texts that were finished are kept: run the same command to go on",
    "analyze": "finished blocks are kept: run the same command to go on",
    "bench": "effects that were measured are kept: run the same command to go on",
    "identify": "effects that were measured are kept: run the same command to go on",
    "frontier": "points that were measured are kept: run the same command to go on",
    "tune": "finished trials are kept: run the same command to go on",
    "finetune": "the last hundred steps at most are lost: run the same command to go on",
}


def overview() -> str:
    """The help page of `geoquant` itself."""
    lines = "".join(f"  {name:<10}{line}\n" for name, (_, line) in COMMANDS.items())
    return f"""\
usage: geoquant COMMAND ...

Compress language models to 2-8 bits; measure what the weights reveal about private training data.

commands:
{lines}
  geoquant COMMAND --help   options and examples
  geoquant --version

for example:
  geoquant quantize MODEL --out RUN --bits 4
  geoquant audit MODEL --members in.jsonl --nonmembers out.jsonl

MODEL is a Hugging Face folder, a hub id, a .gguf file, or `demo`.
"""


def build_app() -> App:
    """The parser with every command registered but none imported."""
    from cyclopts import App, Parameter

    application = App(
        name="geoquant",
        version=__version__,
        help_format="plaintext",
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,
    )
    for name, (place, _) in COMMANDS.items():
        application.command(f"geoquant.cli.{place}", name=name)
    return application


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    code = run(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = broken_pipe()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """The command's exit code; every exception ends here, as one line where the user can mend it."""
    name = arguments[0] if arguments else "--help"
    try:
        if name in ("-h", "--help", "help"):
            print(overview(), end="")
            return 0
        if name == "--version":
            print(__version__)
            return 0
        return parse_and_call(arguments)
    except UserError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print(f"\ngeoquant: interrupted; {RESUME.get(name, 'nothing was changed')}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return broken_pipe()
    except Exception as error:
        known = environment_problem(error)
        return bug(error) if known is None else fail(known)


def parse_and_call(arguments: list[str]) -> int:
    """Find the command, read its options, call it; a command returns None or its exit code."""
    from cyclopts import CycloptsError

    try:
        result = build_app()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        where = f"geoquant {arguments[0]}" if arguments[0] in COMMANDS else "geoquant"
        return fail(f"{parser_message(error)} (see: {where} --help)")
    return result if isinstance(result, int) else 0


def parser_message(error: CycloptsError) -> str:
    """What the parser says, but for two messages that send the reader the wrong way."""
    from cyclopts import MissingArgumentError, UnknownOptionError

    text = str(error)
    if isinstance(error, MissingArgumentError) and error.keyword is None and not error.argument.tokens:
        # The parser says "requires an argument", as if the option had been given; a guess may follow.
        return f"{error.argument.name} is missing" + text.partition(" requires an argument")[2].removesuffix(".")
    if isinstance(error, UnknownOptionError) and error.token.value.partition("=")[0] == "--model":
        return "Unknown option: --model. MODEL stands by itself: geoquant COMMAND MODEL ..."  # not "--order?"
    return text


def fail(message: str) -> int:
    """One line on stderr, exit code 2."""
    print(f"geoquant: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def bug(error: Exception) -> int:
    """Our fault: the traceback for whoever mends it, and a last line that says so."""
    import platform
    import traceback

    traceback.print_exception(error)
    print(
        f"geoquant: this is a bug in geoquant {__version__} (Python {platform.python_version()}); "
        "please report it with the lines above",
        file=sys.stderr,
    )
    return 1


def environment_problem(error: Exception) -> str | None:
    """The one line for failures that no check could see coming: a full disk, exhausted memory, a broken compiler."""
    text = str(error)
    if breaks_on_import(error, "numba", "llvmlite"):
        return f"numba, which compiles the solvers, is missing or broken: {text}; run: pip install -U numba"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full while writing {error.filename or 'a file'}; free some space, then run it again"
    # Torch reports memory through RuntimeError; the subclass for GPUs says "out of memory".
    full = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    if full or isinstance(error, MemoryError):
        return "out of memory; close other programs, or use fewer or shorter --windows, or a smaller model"
    return None


def breaks_on_import(error: BaseException, *packages: str) -> bool:
    """Whether one of these packages is absent, or failed while it was imported (not while it worked)."""
    import traceback

    if isinstance(error, ModuleNotFoundError) and error.name in packages:
        return True
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>")
    return any(frame.f_globals.get("__name__", "").split(".")[0] in packages for frame in frames)


def broken_pipe() -> int:
    """Whoever read stdout (`| head`) has enough: leave quietly, as other tools do."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 141
