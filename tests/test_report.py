"""The report page: says every number, needs no network, survives hostile strings and missing parts."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from geoquant.errors import UserError
from geoquant.report import check_schema, figures, headline, render, write_report
from geoquant.report.page import fingerprint
from geoquant.report.profiles import profile_panels
from geoquant.report.words import attack_label, p_value

VOID = {"meta", "input", "br", "img", "hr", "link", "col", "wbr"}
PARTS = (
    ("self_attn.q_proj", "attention_in", (576, 576)),
    ("self_attn.k_proj", "attention_in", (192, 576)),
    ("self_attn.v_proj", "attention_in", (192, 576)),
    ("self_attn.o_proj", "attention_out", (576, 576)),
    ("mlp.gate_proj", "mlp_in", (1536, 576)),
    ("mlp.up_proj", "mlp_in", (1536, 576)),
    ("mlp.down_proj", "mlp_out", (576, 1536)),
)

SLOPES = {"lengths": 1.1, "steps": 0.4}  # dB from one place of a profile to the next
LIMITS = ("sphere_bound", "gap_db", "headroom_db", "rows_db", "profile")


def sample_sites(draw: random.Random, blocks: int = 30) -> list[dict]:
    """Sites like those of SmolLM2-135M: 30 blocks of seven maps."""
    sites = []
    for block in range(blocks):
        for part, kind, shape in PARTS:
            error = (0.004 if kind == "attention_in" else 0.012) * math.exp(draw.gauss(0.02 * block, 0.25))
            kept = 6 if kind == "mlp_out" and block % 2 else 0
            expected, headroom = error * draw.uniform(0.9, 1.3), 0.022 + 0.01 * block
            slope = {name: [scale * (8 - place) for place in range(17)] for name, scale in SLOPES.items()}
            sites.append(
                {
                    "name": f"model.layers.{block}.{part}",
                    "block": block,
                    "kind": kind,
                    "shape": list(shape),
                    "bits": 4,
                    "bits_per_weight": 4.25 + 0.1 * (kept > 0),
                    "method": "babai",
                    "order": "group-aware",
                    "damping": draw.choice((0.01, 0.03)),
                    "error": error,
                    "heldout_error": error * draw.uniform(1.02, 1.4),
                    "expected_error": expected,
                    "bound": error * 3.4,
                    "clip_rate": draw.choice((0.0, 0.0004, 0.0021)),
                    "sphere_bound": expected / 10 ** (0.15329 + headroom / 10),
                    "gap_db": 1.5329 + headroom,
                    "headroom_db": headroom,
                    "rows_db": 0.0,
                    "profile": slope,
                    "kept": kept,
                    "kept_columns": [17 * (i + block) % shape[1] for i in range(kept)],
                    "reason": "would cost 0.0041, which is 21.7% of this site's error budget" if kept else "",
                }
            )
    return sites


def roc(draw: random.Random, shift: float, n: int) -> dict:
    """An empirical ROC curve of two unit Gaussians `shift` apart."""
    scores = sorted(
        [(draw.gauss(shift, 1), 1) for _ in range(n)] + [(draw.gauss(0, 1), 0) for _ in range(n)],
        reverse=True,
    )
    fpr, tpr = [0.0], [0.0]
    for _, member in scores:
        tpr.append(tpr[-1] + member / n)
        fpr.append(fpr[-1] + (1 - member) / n)
    return {"fpr": fpr, "tpr": tpr}


def sample_privacy(draw: random.Random) -> dict:
    """Three attacks, three subjects; the quantized model still leaks."""
    table = {
        "loss": {"base": (0.503, 0.0), "original": (0.991, 3.4), "quantized": (0.964, 2.6)},
        "reference": {"base": (0.5, 0.0), "original": (0.998, 4.0), "quantized": (0.9834, 3.0)},
        "min-k": {"base": (0.487, -0.05), "original": (0.979, 2.9), "quantized": (0.931, 2.1)},
    }
    attacks = [
        {
            "name": name,
            "subject": subject,
            "auc": auc,
            "ci": [max(auc - 0.031, 0), min(auc + 0.0117, 1)],
            "tpr_at_fpr": {"0.01": {"tpr": min(auc - 0.4737, 1) if auc > 0.6 else 0.012, "ci": [0.003, 0.7719]}},
            "roc": roc(draw, shift, 200),
        }
        for name, subjects in table.items()
        for subject, (auc, shift) in subjects.items()
    ]
    rates = {"base": 0, "original": 31, "quantized": 13}
    extraction = [
        {
            "subject": subject,
            "kind": kind,
            "spans": 73,
            "extracted": got + extra,
            "rate": (got + extra) / 73,
            "ci": [max((got + extra) / 73 - 0.08, 0), (got + extra) / 73 + 0.111],
            "control_rate": 0.0137,
        }
        for kind, extra in (("name", 4), ("phone", 0), ("card number", 2))
        for subject, got in rates.items()
    ]
    exposure = [
        {
            "subject": subject,
            "canaries": [{"name": f"canary-{i}", "repeats": 2**i, "bits": min(mean + i / 2, 19.9)} for i in range(5)],
            "mean_bits": mean + 1.0,
            "limit_bits": 19.93,
            "estimator": "exact over 10^6 digit strings" if subject != "base" else "sampled-rank",
        }
        for subject, mean in (("base", 0.8), ("original", 15.2), ("quantized", 9.37))
    ]
    return {
        "n_members": 200,
        "n_nonmembers": 200,
        "attacks": attacks,
        "extraction": extraction,
        "exposure": exposure,
        "guarantee": None,
    }


def sample() -> dict:
    """A report like the one of the demo."""
    draw = random.Random(0)
    return {
        "schema": 1,
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "source": "runs/demo/finetuned",
            "dtype": "bfloat16",
        },
        "recipe": {
            "method": "babai",
            "bits": 4,
            "group_size": 64,
            "damping": None,
            "formats": ["compressed-tensors"],
        },
        "versions": {"geoquant": "0.1.0", "torch": "2.9.1", "transformers": "5.20.0", "python": "3.11.9"},
        "command": "geoquant quantize runs/demo/finetuned --bits 4 --keep 0.01 --out runs/demo/out",
        "created": "2026-11-22T03:22:36+00:00",
        "seed": 1234,
        "hashes": {name: hashlib.sha256(name.encode()).hexdigest() for name in ("model", "calibration", "members")}
        | {"evaluation": None},
        "size": {
            "bits_per_weight": 4.2871,
            "linear_bytes": 56_912_000,
            "total_bytes": 102_345_678,
            "original_bytes": 269_030_016,
            "kept_bytes": 1_234_000,
        },
        "quality": {
            "text": "WikiText-2 test, first 20 windows",
            "windows": 20,
            "window": 512,
            "original": {"perplexity": 25.5937, "nll": 3.24236, "se": 0.0412, "tokens": 10220},
            "quantized": {"perplexity": 27.4129, "nll": 3.31102, "se": 0.0427, "tokens": 10220},
            "delta_nll": {"value": 0.06866, "se": 0.0038},
            "kl": {"value": 0.0717, "se": 0.0019},
            "tasks": [
                {
                    "name": "PIQA",
                    "original": 0.674,
                    "quantized": 0.662,
                    "delta": -0.012,
                    "se": 0.0091,
                    "items": 500,
                },
                {
                    "name": "ARC-easy",
                    "original": 0.55,
                    "quantized": 0.528,
                    "delta": -0.022,
                    "se": 0.0123,
                    "items": 500,
                },
            ],
        },
        "privacy": sample_privacy(draw),
        "sites": sample_sites(draw),
        "exports": [
            {
                "format": "compressed-tensors",
                "path": "model/",
                "bytes": 102_345_678,
                "verified": {
                    "max_abs_diff": 3.1e-5,
                    "ok": True,
                    "readers": {"transformers": "5.20.0", "peft": "0.18"},
                },
                "snippet": "from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n\n"
                'model = AutoModelForCausalLM.from_pretrained("runs/demo/out/model")\n'
                'model = PeftModel.from_pretrained(model, "runs/demo/out/adapter")\n',
            },
            {"format": "dense", "path": "dense/", "bytes": 269_030_016, "verified": None, "snippet": ""},
        ],
        "warnings": ["model.layers.1.mlp.down_proj: token 0 holds 99.8% of the input energy"],
        "timings": {"observe": 41.27, "solve": 88.94, "evaluate": 33.0, "verify": 12.5},
        "peak_memory_bytes": 1_310_000_000,
        "solver": {"flops": 5.1e12, "seconds": 88.9, "gemm_peak_flops": 9.3e10, "share_of_peak": 0.617},
    }


@pytest.fixture(scope="module")
def whole() -> dict:
    return sample()


@pytest.fixture(scope="module")
def page(whole: dict) -> str:
    return render(whole)


@pytest.fixture
def report(whole: dict) -> dict:
    """A private copy with two blocks only: as many sections, fewer rows."""
    return copy.deepcopy(whole | {"sites": whole["sites"][:14]})


class Reader(HTMLParser):
    """Checks nesting and gathers ids, references, loads and the text a reader sees."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "wbr":
            self.words.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"
        self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_is_well_formed_and_its_references_resolve(page: str) -> None:
    reader = read(page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in reader.tags:
        for key in ("aria-labelledby", "for", "data-of"):
            assert attributes.get(key) is None or attributes[key] in ids
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids


def test_needs_nothing_from_elsewhere(page: str) -> None:
    for tag, attributes in read(page).tags:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
        assert "src" not in attributes
        assert "style" not in attributes, "inline styles are refused by the page's own policy"
        assert not any(name.startswith("on") for name in attributes)
        for key in ("href", "xlink:href", "action"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in page
    assert "url(" not in page


def test_policy_names_the_hashes_of_what_is_inlined(page: str) -> None:
    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S).group(1)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page


def test_says_every_number(page: str, whole: dict) -> None:
    report = whole
    text = read(page).text
    wanted = ["4.29", "4.287", "102 MB", "269 MB", "56.9 MB", "1.23 MB", "2.6×", "−62%"]  # size
    wanted += [
        "25.59",
        "27.41",
        "3.242",
        "3.311",
        "+0.0687",
        "± 0.0038",
        "10,220",
        "0.0717",
        "20 windows of 512",
    ]
    wanted += ["67.4%", "66.2%", "−1.2 ± 0.91 pt", "55.0%", "52.8%", "−2.2 ± 1.2 pt", "500"]
    for attack in report["privacy"]["attacks"]:
        low, high = attack["ci"]
        wanted += [
            f"{attack['auc']:.3f} {low:.3f} to {high:.3f}",
            f"{100 * attack['tpr_at_fpr']['0.01']['tpr']:.1f}%",
        ]
    for row in report["privacy"]["extraction"]:
        wanted += [f"{row['extracted']} of 73 {100 * row['rate']:.1f}% {100 * row['ci'][0]:.1f}% to"]
    wanted += ["1.4%", "45 of 219", "99 of 219", "20.5%"]  # control, extraction totals
    for row in report["privacy"]["exposure"]:
        wanted += [f"{canary['bits']:.1f}" for canary in row["canaries"]] + [f"{row['mean_bits']:.1f}"]
    wanted += ["19.9 bits", "exact over 10^6 digit strings", "200 members against 200 non-members"]
    for site in report["sites"]:
        wanted += [f"{100 * site[key]:.2f}%" for key in ("error", "heldout_error", "expected_error", "bound")]
        wanted += [f"{100 * site['sphere_bound']:.2f}%", f"{site['gap_db']:.2f} {site['headroom_db']:.2f}"]
        wanted += [site["name"]]
    wanted += ["1.70 dB above it in the median (1.55 to 1.84)", "1.53 dB is", "0.17 dB in the median, 0.31 at most"]
    wanted += ["would cost 0.0041, which is 21.7% of this site's error budget", "90 input columns in 15 maps"]
    wanted += [
        "token 0 holds 99.8% of the input energy",
        "3.1e−5",
        "PeftModel.from_pretrained",
        "1.31 GB",
        "62%",
    ]
    wanted += [
        "41.3 s",
        "88.9 s",
        "93.0 Gflop/s",
        report["command"],
        report["created"],
        "1234",
        "134,515,008",
    ]
    wanted += [*report["versions"].values(), *filter(None, report["hashes"].values()), "group_size 64"]
    missing = [what for what in wanted if what not in text]
    assert missing == []


def test_roc_curves_and_errors_are_drawn_where_the_numbers_say() -> None:
    curve = figures.Curve("quantized", "Quantized", 1.0, [0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    drawn = figures.roc_panel("x", [curve], log=False, floor=0.01)
    corners = re.search(r'd="M([^"]*)" class="curve', drawn).group(1).split("L")
    assert len(corners) == 3
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, corner.split())) for corner in corners)
    assert x0 == x1 < x2
    assert y0 > y1 == y2
    # On a log axis from 1% to 100%, 10% lies in the middle.
    half = figures.Curve("quantized", "Quantized", 0.5, [0.01, 0.1, 1.0], [0.0, 0.5, 1.0])
    corners = re.search(r'd="M([^"]*)" class="curve', figures.roc_panel("x", [half], log=True, floor=0.01)).group(1)
    x = [float(corner.split()[0]) for corner in corners.split("L")]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.15)
    points = [figures.LayerPoint(f"s{b}", b, 0.01 * 10**b, None, None, 0.0) for b in range(3)]
    panel = figures.layer_panel("s", points, blocks=3, domain=(0.01, 1.0), clip_top=0.0)
    heights = [float(cy) for cy in re.findall(r'cy="([\d.]+)"', panel)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.15)
    assert heights[0] > heights[1]


def test_numbers_read_well() -> None:
    values = (27.4129, 0.06866, 1580.2, 0, None, float("nan"), 834.4, -0.5, 3.14e-5)
    shown = ["27.4", "0.0687", "1,580", "0", "–", "–", "834", "−0.500", "3.14e−5"]
    assert [figures.number(value) for value in values] == shown
    differences = (0.06866, -6.9e-5, -4e-5, 4e-5, 0.00996, -12.34, 1580.2, 0, None)
    shown = ["+0.0687", "−0.0001", "0.0000", "0.0000", "+0.0100", "−12.3", "+1,580", "0", "–"]
    assert [figures.change(value) for value in differences] == shown
    counts = (0, 999, 1234, 269_030_016, 999_600, None)
    shown = ["0 bytes", "999 bytes", "1.23 kB", "269 MB", "1.00 MB", "–"]
    assert [figures.size(value) for value in counts] == shown
    assert [figures.percent(v) for v in (0.1786, 0, 0.0004, 1)] == ["17.9%", "0.0%", "0.04%", "100.0%"]
    assert figures.ticks_log(0.001, 1.0, 6) == pytest.approx([0.001, 0.01, 0.1, 1.0])


def test_headline_is_computed(report: dict) -> None:
    assert headline(report) == (
        "135M-parameter model: 4.29 bits per linear weight, 269 MB → 102 MB, perplexity 25.6 → 27.4; "
        "the reference-calibrated attack still separates members (AUC 0.98)."
    )


@pytest.mark.parametrize(
    ("auc", "ci", "words"),
    [
        (
            0.53,
            [0.45, 0.61],
            "no attack tried separates members beyond its interval (strongest: loss, AUC 0.53, 95% 0.45 to 0.61)",
        ),
        (0.21, [0.15, 0.29], "the loss attack separates members, with the sign reversed (AUC 0.21)"),
        (0.71, [0.65, 0.79], "the loss attack separates members (AUC 0.71)"),
    ],
)
def test_headline_follows_the_interval(report: dict, auc: float, ci: list, words: str) -> None:
    changed = copy.deepcopy(report)
    attack = next(a for a in changed["privacy"]["attacks"] if a["subject"] == "quantized")
    changed["privacy"]["attacks"] = [{**attack, "name": "loss", "auc": auc, "ci": ci}]
    assert words in headline(changed)
    assert words in read(render(changed)).text


def test_hostile_strings_are_text(report: dict) -> None:
    hostile = "</title></style><script>alert('owned')</script><img src=x onerror=alert(1)>\"'`{{ 7*7 }}"

    def poison(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {(k if k in contract else f"{k}{hostile}"): poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        return hostile if isinstance(value, str) else value

    contract = set(re.findall(r'"(\w+)":', json.dumps({**report, "recipe": {}, "versions": {}, "timings": {}}))) | {
        "0.01"
    }
    clean, owned = read(render(report)), read(render(poison(report)))
    assert hostile in "".join(owned.words)
    assert [tag for tag, _ in owned.tags].count("script") == [tag for tag, _ in clean.tags].count("script") == 1
    assert all(tag != "img" and "onerror" not in attributes for tag, attributes in owned.tags)
    assert "49" not in re.findall(r"'`(.{2})", "".join(owned.words))


def test_missing_parts_say_what_to_pass(report: dict) -> None:
    bare = copy.deepcopy(report) | {
        "privacy": None,
        "solver": None,
        "exports": [],
        "warnings": [],
        "sites": [],
    }
    bare["quality"] |= {"kl": None, "tasks": []}
    text = read(render(bare)).text
    assert "Leakage was not measured. Pass --members FILE and --nonmembers FILE" in text
    assert "leakage was not measured." in headline(bare)
    assert "Pass --keep 0.01" in text
    assert "Nothing was exported." in text
    assert "The run raised no warnings." in text
    assert "KL to the original was not measured." in text
    assert "No formal guarantee" in text


def test_optional_details_are_shown(report: dict) -> None:
    """What the audit adds beyond the contract: intervals of canaries, sizes of controls, its own warnings."""
    more = copy.deepcopy(report)
    for row in more["privacy"]["extraction"]:
        row |= {"control_spans": 57, "kind": row["kind"].replace("name", "all")}
    more["privacy"]["extraction"][-1]["control_spans"] = 0
    more["privacy"]["exposure"][0]["canaries"][0]["ci"] = [0.31, 2.94]
    del more["privacy"]["exposure"][1]["canaries"][3]
    more["privacy"]["warnings"] = ["one <canary> could not be scored"]
    bound = {"epsilon": 1.234, "confidence": 0.95, "delta": 1e-5, "guesses": 40, "correct": 33, "m": 80, "most": 2.9}
    more["privacy"]["one_run"] = [{"subject": "quantized", **bound, "candidates": 3, "covers": "adjacency: one canary"}]
    check_schema(more)
    text = read(render(more)).text
    assert "1.4% of 57" in text
    assert "15 of 73 20.5% 12.5% to 31.6% – Exposure" in text
    assert "0.3 to 2.9" in text
    assert "rank among random values in the same place" in text
    assert "one <canary> could not be scored" in text
    assert "canary-3 8 2.3 – 10.9" in text
    assert "Lower bounds on epsilon" in text
    assert "1.23 2.90 1e-05 95.0% 33 of 40 80" in text
    assert "Adjacency: one canary." in text
    assert "Lower bounds on epsilon" not in read(render(report)).text
    assert "All fields" in text
    # The row of all fields is the total: it is not added to its parts.
    assert "17 of 73" in text
    assert "45 of 219" not in text


def test_empty_lists_inside_privacy(report: dict) -> None:
    bare = copy.deepcopy(report)
    bare["privacy"] |= {"attacks": [], "extraction": [], "exposure": []}
    text = read(render(bare)).text
    assert "No membership attack was run. Pass --members and --nonmembers" in text
    assert "Mark private spans in the members file" in text
    assert "pass them with --canaries" in text


def test_every_measurement_may_be_missing(report: dict) -> None:
    """None wherever a number stands, and NaN likewise: the page still renders, with dashes."""

    def without(value: object, hole: object) -> object:
        if isinstance(value, dict):
            return {k: without(v, hole) for k, v in value.items()}
        if isinstance(value, list):
            return [without(item, hole) for item in value]
        return hole if isinstance(value, float) else value

    for hole in (None, float("nan"), float("inf")):
        text = read(render(without(report, hole))).text
        assert "nan" not in text.lower().split()
        assert "None None" not in text


def test_guarantee_is_never_implied(page: str, report: dict) -> None:
    assert "No formal guarantee" in read(page).text
    for bare in (page, render(report | {"privacy": None})):
        # Whole words, so that the safetensors file format and the names of CSS properties stay out of it.
        assert not re.search(r"\b(anonym\w*|complian\w*|compliant|safe|safely|safety|secure\w*)\b", bare, re.I)


def test_guarantee_prints_its_scope_or_is_refused(report: dict) -> None:
    whole = {
        "adjacency": "weight ball, L2",
        "mechanism": "Gaussian",
        "epsilon": 4.0,
        "delta": 1e-5,
        "scope": "all codes",
        "not_covered": "how far one record moves the weights",
        "sentence": "all of it in words",
    }
    stated = copy.deepcopy(report)
    stated["privacy"]["guarantee"] = whole
    text = read(render(stated)).text
    assert "Formal guarantee, with its scope" in text
    assert "weight ball, L2" in text
    assert "how far one record moves the weights" in text
    assert "No formal guarantee" not in text
    for key in whole:
        stated["privacy"]["guarantee"] = {k: v for k, v in whole.items() if k != key}
        with pytest.raises(UserError, match=rf"privacy\.guarantee\.{key}; no guarantee is printed without it"):
            render(stated)
        stated["privacy"]["guarantee"] = {**whole, key: None}
        with pytest.raises(UserError, match=rf"privacy\.guarantee\.{key} has the wrong type"):
            render(stated)


@pytest.mark.parametrize("where", ["quality.delta_nll.se", "sites.0.reason", "privacy.attacks.3.roc", "solver.flops"])
def test_missing_keys_are_named(report: dict, where: str) -> None:
    broken = copy.deepcopy(report)
    *parents, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    place = broken
    for part in parents:
        place = place[part]
    del place[last]
    named = re.sub(r"\.(\d+)", r"[\1]", where)
    with pytest.raises(UserError) as caught:
        check_schema(broken)
    assert str(caught.value) == f"report.json misses a key; wanted {named}; write the report again"


def test_wrong_types_and_schemas_are_named(report: dict) -> None:
    with pytest.raises(UserError, match=r"size\.total_bytes has the wrong type; got str; wanted int or float"):
        check_schema(report | {"size": report["size"] | {"total_bytes": "102 MB"}})
    with pytest.raises(UserError, match="another schema; got 2; wanted 1"):
        check_schema(report | {"schema": 2})


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_words_stand_out_from_the_paper(page: str, theme: str) -> None:
    """WCAG 2 contrast of every colour that text takes, at least 4.5 (AA)."""
    light, dark, paper = re.findall(r":root \{(.*?)\}", page, re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", {"light": light, "dark": dark, "print": paper}[theme]))

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, two: str) -> float:
        low, high = sorted((luminance(colours[one]), luminance(colours[two])))
        return (high + 0.05) / (low + 0.05)

    names = ("ink", "quiet", "base", "original", "quantized", "error", "bad")
    pairs = [(name, "paper") for name in names] + [
        ("warn", "warn-paper"),
        ("ink", "warn-paper"),
        ("ink", "raised"),
    ]
    assert {pair: round(contrast(*pair), 2) for pair in pairs if contrast(*pair) < 4.5} == {}


def test_attack_names_are_recognised() -> None:
    spellings = ["loss", "Min-K%", "min_k", "min-k++", "min_k_plus_plus", "reference", "zlib", "made-up"]
    labels = ["Loss", "Min-K%", "Min-K%", "Min-K%++", "Min-K%++", "Reference-calibrated", "zlib", "made-up"]
    assert [attack_label(name)[0] for name in spellings] == labels


def test_untested_attacks_are_listed(page: str, report: dict) -> None:
    assert (
        "not run: Min-K%++, zlib, Lowercase, Neighbourhood, RMIA, LiRA, Quantile regression, Combined."
        in read(page).text
    )
    few = copy.deepcopy(report)
    few["privacy"]["n_nonmembers"] = 40
    text = read(render(few)).text
    assert "finer than 40 non-members can resolve. Pass at least 100" in text
    assert "below 2.50%" in text


@pytest.fixture
def audited(report: dict) -> dict:
    """The sample with the keys that came later: p-values, three rates, gate, comparisons, verdict."""
    told = copy.deepcopy(report)
    privacy = told["privacy"]
    for attack in privacy["attacks"]:
        low, high = attack["ci"]
        p = 0.0321 if attack["subject"] == "quantized" else 0.4
        attack |= {"ci_delong": [low - 0.001, high], "p": p / 3, "p_holm": p}
        attack["tpr_at_fpr"]["0.001"] = {"tpr": None, "ci": None, "fpr_ci": [0.0001, 0.0183], "needed": 1000}
    change = {"attack": "loss", "from": "original", "to": "quantized", "difference": -0.0271, "ci": [-0.0402, -0.014]}
    privacy["comparisons"] = [change | {"z": -4.1, "p": 2e-5, "p_holm": 6e-5}]
    size = {"n_members": 200, "n_nonmembers": 199}
    gate = {"valid": True, "auc": 0.487, "ci": [0.43, 0.544], "p": 0.71, "level": 0.01, "alarm": 0.593, "view": "words"}
    privacy["gate"] = gate | size
    privacy["verdict"] = [{"subject": "quantized", "attack": "reference", "separates": True, "level": 0.05}]
    privacy |= {"no_verdict": None, "near_duplicates": {"threshold": 0.7, "pairs": 0, "nonmembers": 0, "first": []}}
    return told


def test_tests_and_comparisons_are_shown(audited: dict) -> None:
    text = read(render(audited)).text
    assert "tells them apart with AUC 0.49 (0.43 to 0.54); 0.59 would have been an alarm" in text
    assert "0.032" in text  # p of the attacks on the quantized model
    assert "Loss Original Quantized −0.0271 −0.040 to −0.014 < 0.0001" in text
    assert "TPR at 0.1% FPR" in text.replace("0.100%", "0.1%")
    assert "separates members (AUC 0.98)" in text
    assert "No verdict" not in text
    assert "nothing here checks" not in text
    for attack in audited["privacy"]["attacks"]:
        attack["p_holm"] = 0.2
    assert "no attack tried separates members beyond chance (strongest" in read(render(audited)).text


def test_records_that_differ_get_no_verdict(audited: dict) -> None:
    privacy = audited["privacy"]
    privacy["gate"] |= {"valid": False, "auc": 0.781}
    privacy |= {"verdict": None, "no_verdict": "members and non-members can be told apart by their words alone"}
    for entry in (*privacy["attacks"], *privacy["comparisons"]):
        entry |= {"p": None, "p_holm": None}
    text = read(render(audited)).text
    assert "No verdict is given. members and non-members can be told apart by their words alone." in text
    assert "no verdict on leakage, for the records differ without any model (blind AUC 0.78)." in text
    assert "no verdict, the records differ" in text
    assert "separates members" not in text
    assert "means that the attack tells members apart" not in text


def test_p_values_in_words() -> None:
    assert [p_value(p) for p in (None, 0.0, 5e-5, 0.00043, 0.0321, 0.5, 1.0)] == [
        "–", "< 0.0001", "< 0.0001", "0.0004", "0.032", "0.50", "1.0",
    ]  # fmt: skip


def test_write_report(tmp_path, report: dict) -> None:
    broken = report | {"peak_memory_bytes": 3, "timings": {"solve": float("nan")}}
    for_json, for_people = write_report(tmp_path, broken)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads(for_json.read_text())["timings"] == {"solve": None}
    assert for_people.read_text(encoding="utf-8") == render(broken)
    # The hash a reviewer signs is that of the file on disk.
    mark = hashlib.sha256(for_json.read_bytes()).hexdigest()
    assert mark == fingerprint(broken)
    assert mark in for_people.read_text(encoding="utf-8")


def test_experts_and_huge_models_stay_small(report: dict) -> None:
    """Many maps of one name per block share one panel, and the page stays a page."""
    sites = sample_sites(random.Random(1), blocks=40)
    experts = [{**site, "name": site["name"].replace("mlp.", f"mlp.experts.{e}.")} for site in sites for e in range(3)]
    page = render(report | {"sites": experts})
    assert page.count('class="panel"') == 2 * 3 + 7 + 7
    assert len(page) < 4_000_000


def test_a_tiny_change_is_shown_without_powers_of_ten(report) -> None:
    report["quality"]["delta_nll"] = {"value": -6.9e-5, "se": 4.1e-4}
    report["quality"]["quantized"]["perplexity"] = report["quality"]["original"]["perplexity"] - 2e-5
    text = read(render(report)).text
    assert "−0.0001 ± 0.0004 nats" in text
    assert "NLL changes by −0.0001 ± 0.0004 nats per token" in text
    # An error is never shown as none.
    report["quality"]["delta_nll"]["se"] = 4.1e-5
    text = read(render(report)).text
    assert "NLL changes by −0.00007 ± 0.00004 nats per token" in text
    assert "−6.9" not in text


def test_a_report_from_before_the_sphere_bound_still_renders(report: dict) -> None:
    """Without the keys that came later, with some sites that have them, and with the nulls of plain rounding."""
    older, mixed, plain = (copy.deepcopy(report) for _ in range(3))
    for site in older["sites"]:
        for key in LIMITS:
            del site[key]
    mixed["sites"] = older["sites"][:7] + mixed["sites"][7:]
    for site in plain["sites"]:
        site |= dict.fromkeys(LIMITS)
    for bare in (older, plain):
        text = read(render(bare)).text
        assert "What lattice and basis could still gain" not in text
        assert "Headroom" not in text
        assert "Damping model.layers.0" in text.replace("Method, order ", "")
    text = read(render(mixed)).text
    assert "Flattest: model.layers.1.self_attn.q_proj, headroom 0.03 dB" in text
    # The rows of older sites show that nothing is known.
    assert re.search(r"model\.layers\.0\.self_attn\.q_proj 576 × 576 4 4\.25 (\S+ ){4}– – – ", text)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("gap_db", "2", "gap_db"), ("profile", [1.0], "profile"), ("profile", {"lengths": ["1"], "steps": []}, "profile")],
)
def test_a_later_key_of_the_wrong_type_is_named(report: dict, key: str, value: object, named: str) -> None:
    report["sites"][3][key] = value
    with pytest.raises(UserError, match=rf"sites\[3\]\.{named}.* has the wrong type"):
        render(report)


def test_what_rows_take_over_is_told_apart(report: dict) -> None:
    for site in report["sites"]:
        site |= {"rows_db": 0.7, "gap_db": site["gap_db"] + 0.7, "bits": None, "clip_rate": 0.0}
    report["recipe"] |= {"grid": "lattice"}
    text = read(render(report)).text
    assert "2.26 dB above it in the median" in text
    assert "The rest, 0.70 dB in the median, is what rows take over" in text
    assert "the box of codes" not in text


def test_profiles_are_drawn_where_the_numbers_say() -> None:
    sites = [
        {"profile": {"lengths": [4.0 * block, 0.0, -4.0 * block], "steps": [1.0, 0.0, -1.0]}} for block in (1, 2, 3)
    ]
    (panel,) = profile_panels({("q_proj", "attention in"): [*sites, {"profile": None}, {}]})

    def corners(css: str) -> list[tuple[float, float]]:
        found = re.search(rf'd="M([^"]*)" class="{css}"', panel["svg"]).group(1)
        return [tuple(map(float, corner.split())) for corner in found.split("L")]

    # One scale: 8 dB of the median lie eight times as far from the middle as 1 dB.
    (x0, top), (x1, zero), (x2, bottom) = corners("series g-lengths")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.15)
    assert zero - top == pytest.approx(bottom - zero, abs=0.15)
    assert zero - top == pytest.approx(8 * (zero - corners("series g-steps")[0][1]), abs=0.9)
    band = corners("band g-lengths")
    assert zero - band[0][1] == pytest.approx(1.5 * (zero - top), abs=0.15)
    assert zero - band[-1][1] == pytest.approx(0.5 * (zero - top), abs=0.15)
    assert "lengths r from −8.0 to 8.0 dB" in panel["svg"]
    hole = {"lengths": [1.0, None], "steps": [1.0, 0.0]}
    assert profile_panels({("q_proj", "x"): [{"profile": hole}]}) == []
