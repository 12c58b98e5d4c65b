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


def test_interpolation_and_refinement():
    alike = {"lever": "anchor", "aim": "everything", "anchor": 0.4, "distance": {"before": 2.0, "after": 1.2}}
    told = control_sentences({"protection": alike, "refinement": {"moved": 0.0123}, "privacy": None})
    assert told[0].startswith("Every weight went 40% of the way back")
    assert told[1] == "Refinement moved 1.2% of the codes by one step."
    assert told[2] == "No formal guarantee."


def test_a_guarantee_speaks_for_itself():
    report = {"protection": {"lever": "guarantee"}, "privacy": {"guarantee": {"epsilon": 1.0}}}
    assert control_sentences(report) == []
