"""`geoquant verify`: does a stock reader see what was solved?"""

from __future__ import annotations

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

    Exit code 0 when every export agrees, 2 when one does not.

    For example:

      geoquant verify RUN
      geoquant verify RUN/model
    """
    with output(json) as result:
        from dataclasses import asdict

        exports = exports_in(folder)
        from geoquant.export.verify import verify as check

        rows = [
            {"path": str(path), **plain_value(asdict(check(path, expected, adapter, tolerance)))}
            for path, expected, adapter in exports
        ]
        ok = all(row["ok"] for row in rows)
        result({"ok": ok, "exports": rows}, lambda: show(rows))
    return 0 if ok else 2


def exports_in(folder: Path) -> list[tuple[Path, Path, Path | None]]:
    """(model folder, expected logits, adapter) of each export in a run, or of the one model given.

    Raises UserError where there is nothing to compare with.
    """
    from geoquant.errors import UserError

    run = folder if (folder / EXPECTED).exists() else folder.resolve().parent
    if not folder.is_dir() or not (run / EXPECTED).exists():
        raise UserError(
            f"nothing to verify in {folder}",
            wanted=f"the folder of a run, which holds {EXPECTED}, or a model inside one",
        )
    models = [folder] if run != folder else sorted(path.parent for path in run.glob("*/config.json"))
    if not models:
        raise UserError(f"the run {run} holds no exported model", fix=f"run: geoquant export {run} --to dense")
    # Kept columns live in the adapter beside the packed model; the dense export already holds them.
    adapter = run / "adapter"
    return [(path, run / EXPECTED, adapter if path.name == "model" and adapter.is_dir() else None) for path in models]


def show(rows: list[dict]) -> None:
    """One line per export."""
    for row in rows:
        verdict = "agrees" if row["ok"] else "DIFFERS"
        print(
            f"{row['path']}: {verdict}, largest difference of logits {row['max_abs_diff']:.3g} "
            f"({row['max_rel']:.2g} of their spread, allowed {row['tolerance']:.2g})"
        )
