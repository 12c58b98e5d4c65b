"""The sentences of the report, computed from its numbers: headline, names of attacks, what is untested."""

from __future__ import annotations

from geoquant.report import figures

__all__ = [
    "ATTACKS",
    "SUBJECTS",
    "attack_label",
    "controls",
    "count",
    "extraction_total",
    "headline",
    "leak_clause",
    "p_value",
    "strongest",
    "untested",
    "weight",
]

VOCABULARY = ("embedding", "head", "tied")  # kinds of sites, see model/vocabulary
LEVEL = 0.05  # of the verdict, as in privacy/audit.py
SUBJECTS = {"base": "Public base", "original": "Original", "quantized": "Quantized"}
# Key (letters and digits of the name, "+" as "p") -> label, what the attack does, in the words of the page.
ATTACKS = {
    "loss": ("Loss", "Calls the records the model finds likely members."),
    "reference": (
        "Reference-calibrated",
        "Compares the loss with the public base's loss on the same record.",
    ),
    "mink": ("Min-K%", "Mean log-probability of each record's least likely tokens."),
    "minkpp": ("Min-K%++", "Min-K%, each token standardised by the model's own distribution."),
    "zlib": ("zlib", "Loss divided by the compressed length of the record."),
    "lowercase": ("Lowercase", "Loss against the same record in lower case."),
    "neighbourhood": ("Neighbourhood", "Loss against slightly altered copies of the record."),
    "rmia": ("RMIA", "Pairwise likelihood ratios calibrated by models trained without the record."),
    "lira": ("LiRA", "Likelihood ratio against shadow models trained with and without the record."),
    "quantile": ("Quantile regression", "Loss against what unseen records of its kind rarely exceed."),
    "combined": ("Combined", "All of these together, weighed on other records than those it judges."),
}


def attack_label(name: str) -> tuple[str, str]:
    """(label, one line on what it does); an unknown attack keeps its own name."""
    return ATTACKS.get(_attack_key(name), (name, ""))


def _attack_key(name: str) -> str:
    key = "".join(letter for letter in name.lower().replace("+", "p") if letter.isalnum())
    return {"neighborhood": "neighbourhood", "minkplusplus": "minkpp", "ref": "reference"}.get(key, key)


def strongest(privacy: dict | None, subject: str = "quantized") -> dict | None:
    """The attack on `subject` whose AUC is farthest from chance, in either direction; one that separates, if any."""
    found = [a for a in (privacy or {}).get("attacks") or [] if a["subject"] == subject and a["auc"] is not None]
    return max(found, key=lambda attack: (_side(attack) != 0, abs(attack["auc"] - 0.5)), default=None)


def _side(attack: dict | None) -> int:
    """+1 or -1 where the attack separates members, by its corrected p-value if there is one, else by its interval."""
    if (attack or {}).get("p_holm") is not None:
        return 0 if attack["p_holm"] > LEVEL else (attack["auc"] > 0.5) - (attack["auc"] < 0.5)
    bounds = (attack or {}).get("ci") or (None, None)
    if None in bounds:
        return 0
    return (bounds[0] > 0.5) - (bounds[1] < 0.5)


def extraction_total(privacy: dict | None, subject: str) -> tuple[int, int] | None:
    """(extracted, spans) over all field kinds, from a row named all/total where there is one."""
    rows = [row for row in (privacy or {}).get("extraction") or [] if row["subject"] == subject]
    rows = [row for row in rows if row["kind"].lower() in ("all", "total")] or rows
    return (sum(row["extracted"] for row in rows), sum(row["spans"] for row in rows)) if rows else None


def leak_clause(privacy: dict | None, subject: str = "quantized") -> str:
    """What the strongest attack on one model came to, in half a sentence."""
    if privacy is None:
        return "leakage was not measured"
    attack = strongest(privacy, subject)
    if attack is None:
        return "no membership attack was run"
    if privacy.get("no_verdict"):
        blind = figures.plain_number(privacy["gate"]["auc"], 2)
        return f"no verdict on leakage, for the records differ without any model (blind AUC {blind})"
    label, auc = attack_label(attack["name"])[0], figures.plain_number(attack["auc"], 2)
    label = label if label.isupper() or not label[:1].isupper() or "-K" in label else label[:1].lower() + label[1:]
    same = [a for a in privacy["attacks"] if a["name"] == attack["name"]]
    before = [a for a in same if a["subject"] == "original" != subject]
    side = _side(attack)
    if side == 0:
        doubt = "chance" if attack.get("p_holm") is not None else "its interval"
        # With few records the interval is wide, and only that keeps this sentence from sounding like a clearance.
        reach = figures.spread(attack.get("ci"), 2)
        return f"no attack tried separates members beyond {doubt} (strongest: {label}, AUC {auc}, 95% {reach})"
    still = "still " if before and _side(before[0]) == side else ""
    if side < 0:
        return f"the {label} attack {still}separates members, with the sign reversed (AUC {auc})"
    return f"the {label} attack {still}separates members (AUC {auc})"


def headline(report: dict) -> str:
    """The report in one sentence, every word of it computed from the numbers."""
    sizes, quality = report["size"], report["quality"]
    parameters = report["model"]["parameters"]
    model = f"{count(parameters)}-parameter model" if parameters else report["model"]["name"]
    before, after = quality["original"]["perplexity"], quality["quantized"]["perplexity"]
    return (
        f"{model}: {figures.plain_number(sizes['bits_per_weight'], 2)} bits per {weight(report['sites'])}, "
        f"{figures.size(sizes['original_bytes'])} → {figures.size(sizes['total_bytes'])}, "
        f"perplexity {figures.number(before)} → {figures.number(after)}; {leak_clause(report['privacy'])}."
    )


def weight(sites: list[dict]) -> str:
    """What bits are counted per: a weight of a linear layer, or of an embedding too where that was solved."""
    return "coded weight" if any(site.get("kind") in VOCABULARY for site in sites) else "linear weight"


def p_value(value: float | None) -> str:
    """0.03, 0.0004, < 0.0001, or a dash."""
    if value is None:
        return figures.NONE
    return "< 0.0001" if value < 1e-4 else figures.number(value, 1 if value < 0.01 else 2)


def count(value: float | None) -> str:
    """135M, 1.5B: a count in three digits."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value is not None and value >= 0.9995 * scale:
            return f"{figures.number(value / scale).removesuffix('.00')}{unit}"
    return figures.NONE if value is None else str(value)


def controls(privacy: dict, subjects: dict[str, str]) -> list[tuple[str, str, str]]:
    """What should find nothing, what it found, and what finding something would mean: (control, found, else)."""
    rows = []
    if gate := privacy.get("gate"):
        low, high = (figures.plain_number(bound, 2) for bound in gate["ci"])
        rows.append(
            (
                "A baseline that reads the records and no model",
                f"AUC {figures.plain_number(gate['auc'], 2)} ({low} to {high}), p {p_value(gate['p'])}; "
                f"alarm from {figures.plain_number(gate['alarm'], 2)}",
                "the two files differ, and attacks may find that difference",
            )
        )
    if (base := strongest(privacy, "base")) is not None:
        low, high = (figures.plain_number(bound, 2) for bound in base["ci"])
        rows.append(
            (
                "Attacks on the public base, which never saw the records",
                f"strongest {attack_label(base['name'])[0]}, AUC {figures.plain_number(base['auc'], 2)} "
                f"({low} to {high}), p {p_value(base.get('p_holm'))}",
                "the two sides differ in a way that a language model sees",
            )
        )
    return rows + [
        (
            f"The same extraction from non-members ({subjects.get(row['subject'], row['subject']).lower()})",
            f"{figures.percent(row['control_rate'])} of {row['control_spans']} spans",
            "so many values can be guessed without having been trained on",
        )
        for row in privacy.get("extraction") or []
        if row["kind"].lower() in ("all", "total") and row.get("control_spans")
    ]


def untested(privacy: dict) -> list[str]:
    """What this run says nothing about: read off what was run, then what no run of this tool covers."""
    ran = {_attack_key(attack["name"]) for attack in privacy["attacks"]}
    missing = [label for key, (label, _) in ATTACKS.items() if key not in ran]
    limits = []
    if missing:
        limits.append(f"Membership attacks that were not run: {', '.join(missing)}.")
    if not privacy["extraction"]:
        limits.append("Extraction: the members hold no marked private spans (`fields`), so none was attempted.")
    if not privacy["exposure"]:
        limits.append("Exposure: no canaries were planted before training, so none could be ranked.")
    if all(attack["subject"] != "base" for attack in privacy["attacks"]):
        limits.append("The public base: without it, what the model knew before fine-tuning cannot be told apart.")
    return [
        *limits,
        f"Rates finer than the sample: {privacy['n_nonmembers']} non-members cannot resolve a false positive "
        f"rate below {figures.percent(1 / max(privacy['n_nonmembers'], 1), 2)}.",
        "Records other than the members given, whoever they concern.",
        "Extraction by paraphrase, by prompts other than those named or made by optimisation, by sampling at other "
        "temperatures.",
        "An attacker who trains on the weights, compares several releases of the model, or uses gradients.",
        "Other doors: properties of the training set as a whole, the calibration text, logs, this report.",
    ]
