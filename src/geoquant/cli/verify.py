"""`geoquant verify`: does a stock reader see what was solved?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import Json
from geoquant.cli.screen import output, plain_value

__all__ = ["exports_in", "verify"]

EXPECTED = "expected.safetensors"


def verify(
    folder: Annotated[Path, Parameter(help="Folder of a run, or one of the exported models inside.")],
    /,
    *,
    tolerance: Annotated[
        float | None,
        Parameter(help="Largest difference of logits, relative to their spread (default: by number type)."),
    ] = None,
    json: Json = False,
) -> int:
    """Reload exports through stock transformers in a fresh process and compare logits with what was solved.

    Exit code 0 when every export agrees, 2 when one does not. Of a run with several exports, one whose reader is not
    installed is named and left out.

    For example:

      geoquant verify RUN
      geoquant verify RUN/model
    """
    with output(json) as result:
        from dataclasses import asdict

        exports = exports_in(folder)
        from geoquant.export.verify import verify as check

        readable = [entry for entry in exports if lacking(entry[0]) is None] or exports
        rows = [
            {"path": str(path), **plain_value(asdict(check(path, expected, adapter, tolerance)))}
            for path, expected, adapter in readable
        ]
        for path, *_ in (entry for entry in exports if entry not in readable):
            print(f"{path} was not verified: {lacking(path)}", file=sys.stderr)
        ok = all(row["ok"] for row in rows)
        result({"ok": ok, "exports": rows}, lambda: show(rows))
    return 0 if ok else 2


def lacking(folder: Path) -> str | None:
    """What is not installed to read this export back, or None."""
    from geoquant.export import FORMATS, unread

    return next((unread(name) for name, format in FORMATS.items() if format.folder == folder.name), None)


def exports_in(folder: Path) -> list[tuple[Path, Path, Path | None]]:
    """(model folder, expected logits, adapter) of each export in a run, or of the one model given.

    Raises UserError where there is nothing to compare with.
    """
    from geoquant.errors import UserError
    from geoquant.export import FORMATS

    run = folder if (folder / EXPECTED).exists() else folder.resolve().parent
    if not folder.is_dir() or not (run / EXPECTED).exists():
        raise UserError(
            f"nothing to verify in {folder}",
            wanted=f"the folder of a run, which holds {EXPECTED}, or a model inside one",
        )
    found = (path for name in ("config.json", "model.gguf") for path in run.glob(f"*/{name}"))
    models = [folder] if run != folder else sorted(path.parent for path in found)
    if not models:
        raise UserError(f"the run {run} holds no exported model", fix=f"run: geoquant export {run} --to dense")
    # Kept columns live in the adapter beside packed models; other exports already hold them.
    adapter = run / "adapter"
    packed = {format.folder for format in FORMATS.values() if format.adapter}
    return [(path, run / EXPECTED, adapter if path.name in packed and adapter.is_dir() else None) for path in models]


def show(rows: list[dict]) -> None:
    """One line per export."""
    from geoquant.export.verify import PEAK

    for row in rows:
        verdict = "agrees" if row["ok"] else "DIFFERS"
        print(
            f"{row['path']}: {verdict}, largest difference of logits {row['max_abs_diff']:.3g} "
            f"({row['max_rel']:.2g} of their spread, allowed {row['tolerance']:.2g}; "
            f"root mean square {row['rms_rel']:.2g}, allowed {row['tolerance'] / PEAK:.2g})"
        )
