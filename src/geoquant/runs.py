"""The run folder: atomic writes, the manifest, per-site results that survive a kill -9.

    RUN/
      manifest.json         recipe, versions, hashes, seed, command, status
      plan.json             what each site gets and why
      goal.json             what was wanted, and why these options serve it (quantize --goal)
      token_weights.safetensors   gradient energies (metric `gradient`), so that a resumed run repeats no backward pass
      sites/BLOCK-STAGE.safetensors   codes, scales, kept columns of the sites that share one input
      original.json, quantized.json   quality before and after
      original_states.safetensors     final hidden states of the original, for the divergence
      {base,original,quantized}_scores.safetensors   per-token statistics of the private records, for the attacks
      expected.safetensors  tokens and logits of the solved model, for `verify`
      model/ adapter/ dense/          the exports
      report.json, report.html

Every file appears by rename of a complete temporary sibling: a file that exists is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoquant.errors import UserError
from geoquant.recipe import Recipe

__all__ = [
    "atomic_directory",
    "atomic_write",
    "check_writable",
    "claim_output",
    "file_hash",
    "inside",
    "read_json",
    "read_metadata",
    "read_tensors",
    "recorded_recipe",
    "remove_empty",
    "sweep",
    "write_json",
    "write_tensors",
]

PARTIAL = ".partial-"
UNWRITABLE = (
    errno.EFBIG,
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only place into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A file of a folder in the making: `atomic_directory` knows under which name the user will look for it.
        if path.parent.name.startswith(PARTIAL):
            raise
        if _disk_full(error):
            raise UserError(
                f"disk full while writing {path}",
                fix="free some space, then run the same command again (quantize: with --resume)",
            ) from None
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise UserError(f"cannot write {path}: {error.strerror}", fix="choose another --out folder") from None
        raise


def _disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and tokenizers wrap the system's error in a type of their own and keep only its text.
    return "No space left" in str(error) or "os error 28" in str(error)


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, flush it to the disk, then rename it to `path`.

    The temporary file has a folder of its own beside `path`: writers such as safetensors make temporary siblings
    themselves, and what a killed run leaves behind must be known as such.
    """
    with _partial_folder(path) as folder:
        partial = folder / path.name
        write(partial)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.chmod(0o644)
        partial.replace(path)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling folder that replaces `path` when the block ends well, and vanishes when it does not."""
    with _partial_folder(path) as partial:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, known by its name as unfinished; it is gone when the block ends."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{path.name[:40]}-", dir=path.parent))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raise UserError where nothing of this name could be written: before the work, not after it. Leaves no trace."""
    made = tuple(takewhile(lambda folder: not folder.exists(), path.parents))
    try:
        with _partial_folder(path):
            pass
        remove_empty(made)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", fix="choose another --out folder") from None


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8") and None)


def inside(folder: Path, *names: str) -> str | None:
    """A hint for who gave the folder above the one that was meant: subfolders that hold one of these files."""
    try:
        found = sorted({str(path.parent) for name in names for path in folder.glob(f"*/{name}")})[:3]
    except OSError:
        return None
    return f"did you mean {' or '.join(found)}?" if found else None


def no_file(path: Path) -> UserError:
    """Why a run lacks a file: it was interrupted, it lies a folder below, or there is none."""
    if path.name == "report.json" and (path.parent / "manifest.json").exists():
        return UserError(
            f"the run in {path.parent} is not finished", fix=f"run: geoquant quantize --out {path.parent} --resume"
        )
    hint = inside(path.parent, path.name, "manifest.json") or "is this the folder of a finished run?"
    return UserError(f"no {path.name} in {path.parent}", fix=hint)


def read_json(path: Path, *, mend: str | None = None, **entries: type) -> dict:
    """Read a JSON object that a run wrote. `entries`: what it must hold, and of which type; mend: what to do where it
    is damaged.

    Raises UserError when it is missing, damaged, or lacks one of them.
    """
    # Without its manifest a folder is no run of ours: nothing could be resumed in it.
    mend = mend or (
        "choose a new folder"
        if path.name == "manifest.json"
        else "delete it and run the same command again (quantize: with --resume)"
    )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise no_file(path) from None
    except NotADirectoryError:
        raise UserError(f"{path.parent} is a file", wanted="the folder of a finished run") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", fix="is this the folder of a finished run?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}", fix=mend) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object", fix=mend)
    for name, kind in entries.items():
        if not isinstance(value.get(name), kind):
            what = "lacks" if name not in value else "holds something else as"
            raise UserError(f"{path} is damaged: it {what} {name!r}", fix=mend)
    return value


def recorded_recipe(run: Path) -> dict:
    """What the run's manifest holds of its recipe: all options that this version knows, and no others.

    Raises UserError where another version wrote it: what the run did is not what today's default of an option that it
    did not know says.
    """
    recipe = read_json(run / "manifest.json", recipe=dict)["recipe"]
    if other := sorted(recipe.keys() ^ Recipe.model_fields.keys()):
        raise UserError(
            f"the run in {run} was started by another version of geoquant, whose options were others",
            got=f"a recipe that differs in {', '.join(other)}",
            fix="go on with that version, or choose a new folder",
        )
    return recipe


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda partial: save_file(contiguous, partial, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file and its metadata."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of one safetensors file; a truncated one is noticed without reading its tensors."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot read {path}: {error}", fix="delete it and run the same command again (quantize: with --resume)"
        ) from None


def claim_output(out: Path, *, resume: bool) -> tuple[Path, ...]:
    """Make `out` ready: new or empty, or a run of ours when resuming. Leftovers of a killed run are swept.

    Returns the folders that had to be made, the innermost first: what a run that is refused may take away again.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file", wanted="a folder")
        entries = [entry for entry in out.iterdir() if not entry.name.startswith(PARTIAL)] if out.exists() else []
        if entries and not (out / "manifest.json").exists():
            raise UserError(f"output folder {out} is not empty", fix="choose a new folder")
        if entries and not resume:
            raise UserError(f"output folder {out} already holds a run", fix="add --resume, or choose a new folder")
        made = tuple(takewhile(lambda folder: not folder.exists(), (out, *out.parents)))
        with _explained(out):
            out.mkdir(parents=True, exist_ok=True)
        sweep(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}", fix="choose another --out folder") from None
    return made


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left unfinished."""
    for leftover in list(folder.rglob(PARTIAL + "*")):  # a folder goes before what it holds
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders as long as they are empty."""
    for folder in folders:
        if any(folder.iterdir()):
            return
        folder.rmdir()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
