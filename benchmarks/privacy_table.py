"""Rows of benchmarks/privacy_curve.py as markdown, and as the picture of bits against utility and leakage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from geoquant.control import strongest_alone
from geoquant.privacy.statistics import clopper_pearson
from privacy_claims import IDENTIFYING, PRIMARY, claims, identifiers, regimes_in

PREFIX = "32"
COLUMNS = (
    "point",
    "bits",
    "perplexity",
    "domain loss",
    "reference AUC",
    "its change",
    "without a reference",
    "TPR at 10% FPR",
    "identifiers extracted",
    "in 100 samples",
    f"records continued from {PREFIX} tokens",
    "exposure, bits",
)
STYLES = {  # solver: colour, marker, line
    "lattice": ("#0b6e4f", "o", "-"),
    "rounded": ("#2f6db5", "v", "-."),
    "babai": ("#b5541c", "s", "--"),
    "rtn": ("#8a5a9e", "^", ":"),
}


def show(rows: Sequence[dict]) -> None:
    """One table a regime, then the statements and their cases."""
    table = {(row["regime"], row["point"]): row for row in rows}
    for regime in regimes_in(table):
        points = [row for row in rows if row["regime"] == regime]
        first = table.get((regime, "original"))
        best = strongest(first) if first else None
        print(f"\n### {regime} ({points[0]['data']})\n")
        if first and (taught := first.get("finetune")):
            low, high = taught["attack"]["ci"]
            print(
                f"Saved after {taught['steps']} steps at AUC {taught['attack']['auc']:.3f} ({low:.3f} to {high:.3f}).\n"
            )
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + "---|" * len(COLUMNS))
        for row in points:
            print("| " + " | ".join(cells(row, best)) + " |")
        if best:
            print(f"\nWithout a reference the strongest attack on the original is {best}.")
    print(f"\n### Statements, tried with the {PRIMARY} attack\n")
    for verdict in claims(rows):
        print(f"- **{verdict.claim}: {verdict.mark}**")
        for case in verdict.cases:
            print(f"  - {case.where}: {case.found}{'' if case.confirmed else ' (no)'}")


def strongest(row: dict) -> str | None:
    """The single attack without a reference that is farthest from chance; chosen once a regime, on its original."""
    return strongest_alone({name: attack["auc"] for name, attack in row["attacks"].items()})


def cells(row: dict, best: str | None) -> list[str]:
    """One line of the table."""
    main, rest = row["attacks"].get(PRIMARY), row["attacks"].get(best)
    spans, hits = identifiers(row)
    parts = [part for kind, part in row["extraction"].items() if kind in IDENTIFYING]
    control, of = (sum(part[name] for part in parts) for name in ("control_extracted", "control_spans"))
    secret = row["exposure"]
    return [
        row["point"],
        f"{row['bits_per_weight']:.2f}",
        f"{row['perplexity']:.2f} ± {row['perplexity'] * row['se']:.2f}",
        f"{row['domain_nll']:.3f} ± {row['domain_se']:.3f}",
        ranged(main, "auc", "ci"),
        changed(main),
        ranged(rest, "auc", "ci"),
        ranged(main or rest, "tpr", "tpr_ci"),
        f"{hits} of {spans} ({control} of {of})" if spans else "–",
        f"{sum(p['in_100'] for p in parts)} ({sum(p['control_in_100'] for p in parts)})" if spans else "–",
        shared(row["continued"].get(PREFIX)),
        "–" if secret is None else f"{secret['mean']:.1f} ± {secret['se'] or 0:.1f} ({number(secret['control'])})",
    ]


def shared(part: dict | None) -> str:
    """How many were written out, and of the control."""
    if part is None:
        return "–"
    return f"{part['extracted']} of {part['spans']} ({part['control_extracted']} of {part['control_spans']})"


def number(value: float | None) -> str:
    """With one decimal."""
    return "–" if value is None else f"{value:.1f}"


def ranged(attack: dict | None, value: str, ci: str) -> str:
    """A figure and its interval."""
    if attack is None or attack[value] is None:
        return "–"
    low, high = attack[ci]
    return f"{attack[value]:.3f} ({low:.3f}–{high:.3f})"


def changed(attack: dict | None) -> str:
    """The change since the original and its p-value, corrected over the attacks."""
    if attack is None or "change" not in attack:
        return "–"
    p = attack["change"]["p_holm"]
    return f"{attack['change']['value']:+.3f}, p {'< 0.0001' if p < 1e-4 else f'= {p:.2g}'}"


# ---- the picture

Band = tuple[float, float, float]  # value, lower and upper end


def bands(row: dict) -> dict[str, Band | None]:
    """What the panels show."""
    main, secret = row["attacks"].get(PRIMARY), row["exposure"]
    spans, hits = identifiers(row)
    low, high = clopper_pearson(hits, spans)
    error = row["perplexity"] * row["se"]
    return {
        "perplexity": (row["perplexity"], row["perplexity"] - error, row["perplexity"] + error),
        "AUC": None if main is None else (main["auc"], *main["ci"]),
        "identifiers extracted": None if not spans else (hits / spans, low, high),
        "exposure, bits": None
        if secret is None
        else (secret["mean"], secret["mean"] - (secret["se"] or 0), secret["mean"] + (secret["se"] or 0)),
    }


def draw(rows: Sequence[dict], out: Path) -> None:
    """A row of panels for each figure, a column for each regime; dashed: the original, dotted: the base."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "geoquant", "font.size": 10})
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    panels = list(bands(rows[0]))
    figure, axes = plt.subplots(
        len(panels),
        len(regimes),
        figsize=(2.6 * len(regimes) + 1, 2.1 * len(panels)),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for column, regime in enumerate(regimes):
        own = [row for row in rows if row["regime"] == regime]
        for line, panel in enumerate(panels):
            panel_of(axes[line][column], own, panel, lambda row, panel=panel: bands(row)[panel])
        axes[0][column].set_title(regime)
        axes[-1][column].set_xlabel("bits per weight")
    for line, panel in enumerate(panels):
        axes[line][0].set_ylabel(panel)
    axes[0][0].set_yscale("log")
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(out, metadata={"Date": None})


def panel_of(axes, rows: Sequence[dict], panel: str, band: Callable[[dict], Band | None]) -> None:
    """One panel: a line for each solver, with intervals (of perplexity and exposure: one standard error)."""
    for name, style in (("original", "--"), ("base", ":")):
        for row in rows:
            if row["point"] == name and (found := band(row)) is not None:
                axes.axhline(found[0], color="#777777", linewidth=1, linestyle=style)
    for solver, (color, marker, style) in STYLES.items():
        points = sorted(
            (row["bits_per_weight"], *found)
            for row in rows
            if row["point"].partition("-")[0] == solver
            and row["point"].count("-") == 1
            and (found := band(row)) is not None
        )
        if points:
            bits, values, low, high = zip(*points)
            axes.plot(bits, values, color=color, marker=marker, markersize=4, linestyle=style, label=solver)
            axes.fill_between(bits, low, high, color=color, alpha=0.12, linewidth=0)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
