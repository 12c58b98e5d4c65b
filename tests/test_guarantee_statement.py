"""A guarantee cannot be had without what it means: every refusal, and every word of the sentence."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from geoquant.errors import UserError
from geoquant.privacy.guarantee.adjacency import Inherited, OneRecord, WeightBall, euclidean, in_metric, in_steps
from geoquant.privacy.guarantee.inherited import inherit
from geoquant.privacy.guarantee.noise import SOURCE, sigma_for
from geoquant.privacy.guarantee.provenance import Public, private
from geoquant.privacy.guarantee.scope import Scope, scope_of
from geoquant.privacy.guarantee.statement import GaussianNoise, Guarantee, Rounding, epsilon_of_attack
from geoquant.privacy.guarantee.weight_ball import release
from geoquant.privacy.outcome import AttackResult
from geoquant.report.schema import _SCHEMA

EPSILON, DELTA = 4.0, 1e-5
BALL = WeightBall(0.5, euclidean())
SCOPE = Scope(("a", "b"), ("c",), base="the public base SmolLM2-135M")


def gaussian(sensitivity: float = 0.5, dimensions: int = 1000, **changes) -> GaussianNoise:
    sigma, slack = sigma_for(EPSILON, DELTA, sensitivity, dimensions)
    return GaussianNoise(sigma, sensitivity, slack, "the change from the public base", **changes)


def guarantee(**changes) -> Guarantee:
    given = {"epsilon": EPSILON, "delta": DELTA, "adjacency": BALL, "mechanism": gaussian(), "scope": SCOPE}
    return Guarantee(**(given | changes))


def test_the_sentence_says_all_of_it_and_what_it_does_not_cover():
    said = guarantee().sentence
    for part in (
        "(4, 1e-05)", "any two weight vectors within 0.5", "L2 distance in units of the weights", "over all covered",
        "Gaussian noise of standard deviation", SOURCE, "no seed kept", "sensitivity 0.5", "-GDP",
        "2 of 3 tensors: a, b", "the rest is bit for bit of the public base SmolLM2-135M: c",
        "about weights, not about people",
        "Does not cover", "Other releases", "settings chosen by looking at private data",
    ):  # fmt: skip
        assert part in said, part
    assert not any(word in said for word in ("anonym", "complian", "GDPR"))
    record = guarantee(adjacency=OneRecord(10, 2.5), mechanism=gaussian(0.5)).sentence
    assert "one record replaced, added or removed, which lies in one of 10 disjoint shards" in record
    assert "clipped to L2 norm 2.5" in record
    assert "A person with several records" in record
    assert "about weights, not" not in record


def test_the_entry_of_the_report_has_every_key_that_the_report_demands():
    entry = guarantee().to_dict()
    for key, kind in _SCHEMA["privacy"]["guarantee"].items():
        assert isinstance(entry[key], kind)
    assert json.loads(json.dumps(entry)) == entry


def test_the_parts_cannot_be_left_out():
    fields = dataclasses.fields(Guarantee)
    assert all(field.default is dataclasses.MISSING for field in fields)
    with pytest.raises(TypeError):
        Guarantee(4.0, 1e-5)
    with pytest.raises(UserError, match="means nothing without its adjacency"):
        guarantee(adjacency=None)
    with pytest.raises(UserError, match="means nothing without its adjacency"):
        guarantee(adjacency="any two models")
    with pytest.raises(UserError, match="which tensors it covers"):
        guarantee(scope=None)
    with pytest.raises(UserError, match="no mechanism with an accounting"):
        guarantee(mechanism=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        guarantee().epsilon = 1.0


@pytest.mark.parametrize("kind", ["to nearest", "stochastically"])
def test_rounding_has_no_epsilon(kind):
    with pytest.raises(UserError, match=f"rounding {kind} has no epsilon"):
        guarantee(mechanism=Rounding(kind))


def test_a_privately_chosen_subset_has_no_epsilon():
    with pytest.raises(UserError, match="chosen by looking at private data"):
        guarantee(scope=dataclasses.replace(SCOPE, chosen="privately"))


def test_a_stored_seed_is_refused_wherever_it_could_come_in():
    with pytest.raises(UserError, match="takes no seed and keeps none"):
        gaussian(source="torch.Generator().manual_seed(7)")
    held, base = private({"a": torch.zeros(3)}, "m"), {"a": Public(torch.zeros(3), "the base")}
    with pytest.raises(UserError, match="takes no seed"):
        release(held, base, BALL, epsilon=1.0, delta=1e-5, seed=7)
    assert "seed" not in guarantee().to_dict()
    assert not [field.name for field in dataclasses.fields(GaussianNoise) if "seed" in field.name]


def test_an_attack_is_no_epsilon():
    attack = AttackResult("loss", "quantized", 0.5, (0.45, 0.55), (0.45, 0.55), 1.0, 1.0, {}, ([], []), (None, None))
    with pytest.raises(UserError, match="AUC is no epsilon"):
        epsilon_of_attack(attack)
    with pytest.raises(UserError, match="no mechanism with an accounting; got AttackResult"):
        guarantee(mechanism=attack)
    with pytest.raises(UserError, match="numbers that an accounting gives"):
        guarantee(epsilon=attack)


@pytest.mark.parametrize("claimed", [3.999, 1.0, 0.0])
def test_a_smaller_epsilon_than_the_accounting_gives_is_refused(claimed):
    with pytest.raises(UserError, match="does not give this guarantee"):
        guarantee(epsilon=claimed)


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"delta": 1.0}, {"epsilon": math.nan}, {"epsilon": math.inf}])
def test_numbers_that_are_none_are_refused(wrong):
    with pytest.raises(UserError, match="this is no"):
        guarantee(**wrong)


def test_noise_for_closer_neighbours_is_refused():
    with pytest.raises(UserError, match="closer than these"):
        guarantee(adjacency=WeightBall(0.51, euclidean()))
    with pytest.raises(UserError, match="closer than these"):
        guarantee(adjacency=OneRecord(10, 5.0))  # 2 C / k is 1, not C / k
    with pytest.raises(UserError, match="does not belong to this mechanism"):
        guarantee(adjacency=Inherited("one record added"))


def test_a_tensor_outside_is_no_guarantee_for_the_model():
    base = {"a": torch.zeros(4), "b": torch.zeros(4), "norm": torch.ones(4)}
    shipped = {"a": torch.rand(4), "b": torch.zeros(4), "norm": torch.ones(4)}
    scope = scope_of(shipped, base, {"a"})
    assert (scope.covered, scope.public, scope.uncovered) == (("a",), ("b", "norm"), ())
    guarantee(scope=scope)
    shipped["norm"] = torch.ones(4) * (1 + 1e-6)
    scope = scope_of(shipped, base, {"a"})
    assert scope.uncovered == ("norm",)
    with pytest.raises(UserError, match=r"outside of the mechanism.*got norm"):
        guarantee(scope=scope)


def test_the_base_means_its_bits():
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([float("nan")])}
    assert scope_of({"x": torch.ones(1)} | base, base, {"x"}).public == ("a", "b")
    for other in (
        torch.tensor([-0.0, 1.0]), base["a"].double(), base["a"][None], torch.tensor([0.0, 1.0 + 2e-7]),
        base["a"].view(torch.int32),
    ):  # fmt: skip
        assert scope_of({"a": other}, base, ()).uncovered == ("a",)
    assert scope_of({"new": torch.ones(1)}, base, ()).uncovered == ("new",)
    with pytest.raises(UserError, match="not part of the model"):
        scope_of({"a": base["a"]}, base, {"z"})
    with pytest.raises(UserError, match="nothing was released"):
        guarantee(scope=scope_of(base, base, ()))


def test_shapes_of_a_norm_are_public_values():
    step = Public(torch.full((2, 1), 0.1), "steps of the base")
    assert "steps of the base" in in_steps({"w": step}).words
    assert "damping 1%" in in_metric({"w": Public(torch.eye(2), "public text, damping 1%")}).words
    held = private({"w": torch.ones(2, 1)}, "m")["w"]
    for wrong in (held, torch.ones(2, 1)):
        with pytest.raises(TypeError, match="must be a Public value"):
            in_steps({"w": wrong})
        with pytest.raises(TypeError, match="must be a Public value"):
            in_metric({"w": wrong})
    with pytest.raises(UserError, match="must be above 0"):
        in_steps({"w": Public(torch.tensor([0.1, 0.0]), "x")})
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="is a length"):
            WeightBall(wrong, euclidean())
        with pytest.raises(UserError, match="is a length"):
            OneRecord(3, wrong)
    with pytest.raises(UserError, match="at least one shard"):
        OneRecord(0, 1.0)


CLAIM = {
    "epsilon": 3.0,
    "delta": 1e-6,
    "adjacency": "one record added or removed, Poisson sampling",
    "mechanism": "DP-SGD",
    "who": "the hospital's training group",
}


def inherited(tmp_path, changes=None, tensors=None, drop=None):
    claim = {key: value for key, value in (CLAIM | (changes or {})).items() if key != drop}
    path = tmp_path / "claim.json"
    path.write_text(json.dumps(claim))
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    return inherit(path, tensors or {"a": torch.ones(2), "b": torch.zeros(2)}, base, ["a"])


def test_a_trainers_guarantee_is_inherited_word_for_word(tmp_path):
    found = inherited(tmp_path)
    assert (found.guarantee.epsilon, found.guarantee.delta) == (3.0, 1e-6)
    assert torch.equal(found.tensors["a"].values, torch.ones(2))
    said = found.guarantee.sentence
    for part in (
        CLAIM["adjacency"], "DP-SGD, as claimed by the hospital's training group", "GeoQuant did not check",
        "1 of 2 tensors: a", "the rest is bit for bit of",
    ):  # fmt: skip
        assert part in said, part
    with pytest.raises(UserError, match="does not give this guarantee"):
        dataclasses.replace(found.guarantee, epsilon=2.9)
    with pytest.raises(UserError, match="does not give this guarantee"):
        dataclasses.replace(found.guarantee, delta=1e-7)


@pytest.mark.parametrize("key", CLAIM)
def test_a_statement_without_one_of_its_parts_gives_nothing(tmp_path, key):
    with pytest.raises(UserError, match=f"lacks '{key}'"):
        inherited(tmp_path, drop=key)
    with pytest.raises(UserError, match="lacks"):
        inherited(tmp_path, {key: " " if isinstance(CLAIM[key], str) else "4"})


def test_what_the_trainer_did_not_cover_voids_it(tmp_path):
    with pytest.raises(UserError, match="outside of the mechanism"):
        inherited(tmp_path, tensors={"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(UserError, match="cannot be read"):
        inherit(tmp_path / "none.json", {}, {}, [])
