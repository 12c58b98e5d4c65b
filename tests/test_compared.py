"""Labels of two identifications beside each other: against sklearn, and over two architectures from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from conftest import make_tokenizer, tiny_llama
from geoquant import cli
from geoquant.errors import UserError
from geoquant.model.walk import Site
from geoquant.outliers.compared import check_comparable, compared, read_identity, sentences
from geoquant.outliers.groups import make_groups, parse_grouping

LABELS = ("functional", "sensitive", "both", "neither")


def row(group, label, rise=0.0, do="zero"):
    return {
        "group": group,
        "intervention": do,
        "label": label,
        "functional": label in ("functional", "both"),
        "sensitive": label in ("sensitive", "both"),
        "effect": {"public": {"value": rise}},
    }


def other(rows, **more):
    told = {"model": {"name": "it", "sha256": "0"}, "groups": "depth:9", "seed": 3, "settings": {"do": ["zero"]}}
    return told | {"rows": rows} | more


@pytest.mark.parametrize("seed", range(5))
def test_kappa_and_ranks_are_those_of_sklearn_and_scipy(seed):
    """40 groups here, 35 there, in another order; 30 have a name in common."""
    rng = np.random.default_rng(seed)
    mine, its = rng.choice(LABELS, 40), rng.choice(LABELS, 40)
    its[:20] = mine[:20]
    rises = rng.standard_normal((2, 40))
    own = [row(f"g{i}", mine[i], rises[0, i]) for i in range(40)]
    rest = [row(f"g{i}" if i < 30 else f"h{i}", its[i], rises[1, i]) for i in rng.permutation(35)]
    found = {one["of"]: one for one in compared(own, other(rest), "there")}
    assert found["label"]["value"] == pytest.approx(cohen_kappa_score(mine[:30], its[:30]))
    for of, names in (("functional", ("functional", "both")), ("sensitive", ("sensitive", "both"))):
        sides = [np.isin(side[:30], names) for side in (mine, its)]
        assert found[of]["value"] == pytest.approx(cohen_kappa_score(*sides))
        assert found[of]["same"] == np.mean(sides[0] == sides[1])
    assert found["label"]["rank"] == pytest.approx(spearmanr(*rises[:, :30]).statistic)
    assert (found["label"]["count"], found["label"]["left"], found["label"]["seed"]) == (30, 15, 3)
    assert found["label"]["ci"][0] < found["label"]["value"] < found["label"]["ci"][1]


def test_labels_that_are_all_alike_have_no_kappa_and_say_so():
    rows = [row(f"g{i}", "functional", float(i)) for i in range(6)]
    found = compared(rows, other(rows), "there")
    assert [one["value"] for one in found] == [None] * 3
    (told,) = sentences(found)
    assert told.startswith(
        "zero: this model and it (there) give the same label to 6 of 6 groups of one name, all alike"
    )
    assert "rank correlation +1.00" in told
    lost = [row(f"g{i}", "neither", None) for i in range(6)]
    assert "rank correlation" not in sentences(compared(rows, other(lost), "there"))[0]


def test_only_what_both_did_is_compared():
    rows = [row(f"g{i}", "neither", do=do) for i in range(5) for do in ("zero", "revert")]
    assert {one["intervention"] for one in compared(rows, other([row("g1", "neither")]), "there")} == {"zero"}
    with pytest.raises(UserError, match="no intervention in common"):
        check_comparable(other([]), "there", ["revert"], ["g1"], "site")
    with pytest.raises(UserError, match="--groups depth:9 there, site here") as refused:
        check_comparable(other([row("g1", "both")]), "there", ["zero"], ["layer"], "site")
    assert "depth:K to both" in str(refused.value)
    check_comparable(other([row("g1", "both")]), "there", ["zero", "revert"], ["g1", "g2"], "depth:9")


def test_a_damaged_identification_is_refused(tmp_path):
    (tmp_path / "identity.json").write_text(json.dumps(other([{"group": "a"}])))
    with pytest.raises(UserError, match="damaged: a part is missing"):
        read_identity(tmp_path)


@pytest.mark.parametrize(("blocks", "count"), [(30, 8), (8, 8), (7, 3), (5, 1)])
def test_stretches_of_depth_are_even_in_order_and_named_alike(blocks, count):
    kinds = ("attention_in", "attention_out", "mlp_in")
    sites = [Site(f"b.{b}.{kind}", b, (2, 2), kind, "") for b in range(blocks) for kind in kinds]
    groups = make_groups(parse_grouping(f"depth:{count}"), sites)
    names = {f"{kind} {k}/{count}" for k in range(1, count + 1) for kind in ("attention", "mlp")}
    assert {group.name for group in groups} == names
    assert len(groups) == 2 * count
    for kind, each in (("attention", 2), ("mlp", 1)):
        sizes = [len(group.parts) / each for group in groups if group.kind == kind]
        assert sum(sizes) == blocks
        assert max(sizes) - min(sizes) <= 1
    places = [int(part.site.split(".")[1]) for group in groups if group.kind == "mlp" for part in group.parts]
    assert places == list(range(blocks))


def test_two_architectures_are_compared_through_the_command(tmp_path, capsys):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    for name, model in (("llama", tiny_llama()), ("neox", GPTNeoXForCausalLM(config))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    common = ["--groups", "depth:2", "--do", "zero", "--windows", "4", "--window", "24"]

    def identify(model, out, *more):
        return cli.run(["identify", str(tmp_path / model), "--out", str(tmp_path / out), *common, *more])

    assert identify("llama", "first") == 0
    assert identify("neox", "second", "--compare", str(tmp_path / "first")) == 0
    shown = capsys.readouterr().out
    assert f"this model and llama ({tmp_path / 'first'}) give the same label to" in shown
    told = [json.loads((tmp_path / name / "identity.json").read_text()) for name in ("first", "second")]
    labels = [{one["group"]: one["label"] for one in side["rows"]} for side in told]
    assert labels[0].keys() == labels[1].keys() == {f"{k} {n}/2" for k in ("attention", "mlp") for n in (1, 2)}
    one = next(one for one in told[1]["compared"] if one["of"] == "label")
    assert one["count"] == 4
    assert one["same"] == np.mean([labels[0][name] == labels[1][name] for name in labels[0]])
    assert told[0]["compared"] == []
    assert "Beside other identifications" in (tmp_path / "second" / "identity.html").read_text()
    assert "Beside other" not in (tmp_path / "first" / "identity.html").read_text()
    # Another seed of the same model, added to what is finished.
    assert identify("llama", "third", "--seed", "1", "--compare", str(tmp_path / "first")) == 0
    third = json.loads((tmp_path / "third" / "identity.json").read_text())["compared"][0]
    assert third["same"] == 1
    assert third["sha256"] == told[0]["model"]["sha256"]
