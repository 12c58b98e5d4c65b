"""`geoquant records`: private records of people who do not exist, to train a model on and audit it with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from geoquant.cli.options import WHOLE, Json
from geoquant.cli.screen import output

__all__ = ["records"]


def records(
    *,
    domain: Annotated[str, Parameter(help="What they are about: support, medical, finance or code.")],
    out: Annotated[Path, Parameter(help="Folder to make: new, or empty.")],
    n: Annotated[int, Parameter(name="--n", help="Records on all sides together, 100 to 50000."), WHOLE] = 1000,
    seed: Annotated[int, Parameter(help="The same seed gives the same files."), WHOLE] = 0,
    canaries: Annotated[
        int, Parameter(help="Planted secrets; a fair coin for each decides whether it is."), WHOLE
    ] = 64,
    json: Json = False,
) -> None:
    """Synthetic private records with marked spans: members, non-members, held out, canaries, and what to train on.

    Two fifths are members, two fifths non-members, by coin flips; statement.json holds every coin and hash.

    For example:

      geoquant records --domain medical --n 1000 --seed 7 --out RECORDS
      geoquant audit MODEL --members RECORDS/members.jsonl --nonmembers RECORDS/nonmembers.jsonl
    """
    with output(json) as result:
        from geoquant.data.folder import check_output, write_folder
        from geoquant.data.synthetic import synthetic_records

        check_output(out)
        made = synthetic_records(domain, n, seed, canaries=canaries)
        command = f"geoquant records --domain {domain} --n {n} --seed {seed} --canaries {canaries}"
        statement = write_folder(made, out, command=command)
        result(statement, lambda: show(statement, out))


def show(statement: dict, out: Path) -> None:
    """One line a file, and what to do with it."""
    counts = statement["counts"]
    uses = {
        "train.jsonl": "train on this: members, planted canaries as often as they repeat",
        "members.jsonl": "audit --members",
        "nonmembers.jsonl": "audit --nonmembers",
        "holdout.jsonl": "never trained on, never audited: choose and calibrate with it",
        "canaries.jsonl": f"audit --canaries; {counts['included']} of {counts['canaries']} are planted",
    }
    for name, use in uses.items():
        if name in statement["files"]:
            print(f"{out / name}  {statement['files'][name]['records']}  {use}")
    print(f"{out / 'statement.json'}  seed {statement['seed']}, coins, hashes: whoever holds it knows the members")
