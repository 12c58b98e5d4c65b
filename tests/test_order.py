"""Orders are permutations with the structure they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.basis import damped
from geoquant.lattice.order import ORDERS, column_order
from oracles.lattice import random_metric


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(ORDERS)),
    columns=st.integers(1, 60),
    group_size=st.sampled_from([1, 4, 7, 1000]),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["dense", "rank one", "zero", "dead half", "equal"]),
    share=st.sampled_from([0.0, 0.1, 0.6]),
)
def test_orders_are_permutations_with_kept_columns_last(name, columns, group_size, seed, kind, share):
    metric = random_metric(columns, seed, rank=1 if kind == "rank one" else None)
    if kind == "zero":
        metric = torch.zeros_like(metric)
    elif kind == "dead half":
        metric[: columns // 2] = metric[:, : columns // 2] = 0
    elif kind == "equal":
        metric = torch.eye(columns, dtype=torch.float64)
    last = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[: int(share * columns)]
    order = column_order(name, metric, group_size, last=last)
    assert sorted(order.tolist()) == list(range(columns))
    assert set(order[columns - len(last) :].tolist()) == set(last.tolist())
    free = column_order(name, metric, group_size)
    held = set(last.tolist())
    assert order[: columns - len(last)].tolist() == [c for c in free.tolist() if c not in held]


def test_natural_and_activation():
    metric = torch.diag(torch.tensor([2.0, 5.0, 5.0, 1.0]))
    assert column_order("natural", metric, 2).tolist() == [0, 1, 2, 3]
    assert column_order("activation", metric, 2).tolist() == [1, 2, 0, 3]


@settings(max_examples=40, deadline=None)
@given(
    columns=st.integers(1, 60),
    group_size=st.sampled_from([1, 3, 8, 100]),
    levels=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_group_aware_keeps_groups_whole(columns, group_size, levels, seed):
    """Also where groups tie: few distinct energies make whole groups equal."""
    energies = torch.randint(0, levels, (columns,), generator=torch.Generator().manual_seed(seed)).float()
    order = column_order("group-aware", torch.diag(energies), group_size).tolist()
    groups = [column // group_size for column in order]
    runs = [group for index, group in enumerate(groups) if index == 0 or groups[index - 1] != group]
    assert len(runs) == len(set(runs))
    means = [energies[group * group_size : (group + 1) * group_size].mean().item() for group in runs]
    assert means == sorted(means, reverse=True)
    for group in runs:
        inside = [energies[column].item() for column in order if column // group_size == group]
        assert inside == sorted(inside, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_min_pivot_leaves_the_shortest_residual_for_last(seed):
    """Sorted QR: each column is no longer than any earlier one, both measured off the span of the columns after."""
    columns = 25
    metric = random_metric(columns, seed)
    order = column_order("min-pivot", metric, 64)
    target = damped(metric, 0.01)

    def residual(column: int, after: torch.Tensor) -> float:
        if not len(after):
            return target[column, column].item()
        cross = target[after, column]
        return (target[column, column] - cross @ torch.linalg.solve(target[after][:, after], cross)).item()

    for position in range(columns):
        after = order[position + 1 :]
        own = residual(int(order[position]), after)
        others = [residual(int(column), after) for column in order[:position]]
        assert all(own <= other * (1 + 1e-9) for other in others)
        if position:
            # Lovasz' condition with delta = 1 for the pair that could be swapped.
            assert own <= residual(int(order[position - 1]), after) * (1 + 1e-9)
