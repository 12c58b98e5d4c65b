"""What the page and the last lines of a run say of levers."""

from __future__ import annotations

from geoquant.report.control import control_sentences, moved_rows

AIMED = {
    "lever": "anchor",
    "aim": "memory",
    "anchor": 0.7,
    "distance": {"before": 30.31, "after": 26.4},
    "moved": {"embed_tokens": 0.07, "q_proj": 0.49, "norm": 1.0},
    "taught": {
        "private": {"all": 3.87, "put_back": 1.5},
        "domain": {"all": 2.34, "put_back": -0.02},
        "public": {"all": -0.73, "put_back": -1.6},
    },
}


def test_nothing_is_said_where_nothing_was_done():
    assert control_sentences({"protection": None, "privacy": None}) == []
    assert control_sentences({"privacy": None}) == []
    assert moved_rows({}) == []


def test_an_aimed_anchor_is_told_with_its_numbers_and_without_a_promise():
    told = " ".join(control_sentences({"protection": AIMED, "privacy": None}))
    for words in ("times 0.7", "from 30.31 to 26.4", "+1.50 of +3.87 on private", "-0.02 of +2.34 on domain"):
        assert words in told
    assert "No formal guarantee" in told
    assert moved_rows({"protection": AIMED}) == [("final norm", 1.0), ("q_proj", 0.49), ("embeddings", 0.07)]


def test_refinement_block_by_block_and_of_rows():
    errors = [{"before": {"total": a}, "after": {"total": b}} for a, b in ((0.1, 0.05), (0.3, 0.2), (0.2, 0.15))]
    classes = [{"bulk": {"rows": 30, "above": a}, "spike": {"rows": 10, "above": b}} for a, b in ((0.2, 0.4), (0.1, 0))]
    geometry = {"classes": {"before": classes[0], "after": classes[1]}}
    for kept, where in ((True, "from there"), (False, "from the solver's codes, whose objective was lower")):
        refinement = {"moved": 0.1, "blocks": {"errors": errors, "kept": kept}, "geometry": geometry}
        told = control_sentences({"refinement": refinement, "privacy": None})
        assert told[1:3] == [
            f"Block by block, errors of outputs fell from 0.2 to 0.15 (medians); refinement began {where}.",
            "Of 40 rows 25.0% lay above their threshold of distortion, 7.5% afterwards.",
        ]


def test_interpolation_and_refinement():
    alike = {"lever": "anchor", "aim": "everything", "anchor": 0.4, "distance": {"before": 2.0, "after": 1.2}}
    told = control_sentences({"protection": alike, "refinement": {"moved": 0.0123}, "privacy": None})
    assert told[0].startswith("Every weight went 40% of the way back")
    assert told[1] == "Refinement moved 1.2% of the codes by one step."
    assert told[2] == "No formal guarantee."


METRIC = {
    "lever": "anchor",
    "aim": "metric",
    "anchor": 0.4,
    "distance": {"before": 2.0, "after": 1.25},
    "kept": {"layers": 12, "by_share": 0, "unchanged": 0, "private": 0.52, "function": 0.67},
}


def test_an_anchor_by_the_metric_is_told_with_what_the_metric_told_apart():
    told = control_sentences({"protection": METRIC, "privacy": None})
    assert (
        "on public and domain text with a weight of 60%, those of the base on private records with one of 40%"
        in (told[0])
    )
    assert told[0].endswith("The length of the change since the base fell from 2 to 1.25.")
    assert told[1] == (
        "As inputs of private records see it, the change of a layer kept 52% of its length, as the others do 67%; "
        "interpolation would have kept 60% of both."
    )
    assert told[2].startswith("No formal guarantee: where layers went back was computed from private data")
    experts = {**METRIC, "kept": {"layers": 0, "by_share": 3, "unchanged": 2, "private": None, "function": None}}
    told = control_sentences({"protection": experts, "privacy": None})
    assert told[1] == "2 layers had not changed since the base."
    assert told[2] == "3 layers that not every token reaches went 40% of the way."


PLANNED = {
    "looked": True,
    "anchors": True,
    "stages": [{"name": "a", "planned": 4.0, "got": 3.99}, {"name": "b", "planned": 2.5, "got": 2.5}],
    "bytes": {"planned": 60e6, "got": 59.8e6},
}
SHARES = {"lever": "plan", "weights": [[0.0, 0.5], [0.25, 0.2], [1.0, 0.3]], "distance": {"before": 2.0, "after": 1.2}}


def test_a_plan_is_told_with_its_rates_its_shares_and_without_a_promise():
    told = control_sentences({"plan": PLANNED, "protection": SHARES, "privacy": None})
    assert told[0] == ("A plan chose the rate of each of 2 stages, 2.5 to 4 bits per weight: 59.8 MB, planned 60 MB.")
    assert "keep, as planned: 30.0% of the weights all, 20.0% of the weights 25%, 50.0% of the weights none." in told[1]
    assert "fell from 2 to 1.2" in told[1]
    assert told[2] == (
        "No formal guarantee: rates and shares were computed from private data and show in the file, and whoever has "
        "the base sees which weights went back."
    )
    rates = control_sentences({"plan": PLANNED | {"anchors": False}, "protection": None, "privacy": None})
    assert rates[1:] == [
        "It put no weight back to the public base.",
        "No formal guarantee: rates were computed from private data and show in the file.",
    ]
    public = control_sentences({"plan": PLANNED | {"looked": False}, "protection": SHARES, "privacy": None})
    assert public[-1] == "No formal guarantee."


def test_a_guarantee_speaks_for_itself():
    report = {"protection": {"lever": "guarantee"}, "privacy": {"guarantee": {"epsilon": 1.0}}}
    assert control_sentences(report) == []
