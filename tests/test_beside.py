"""The compiled recursion: however rows are grouped and shared out, the codes are the same."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.lattice.basis import metric_factor
from geoquant.lattice.beside import Pulls
from geoquant.lattice.rows import RowMetric, block_sizes, row_metric
from geoquant.lattice.unboxed import exponents, steps_of, unboxed_babai
from oracles.lattice import random_metric


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([1, 3, 5, 64, 100, 256]),
    sites=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    columns=st.sampled_from([1, 3, 16, 70]),
    drawn=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_know_neither_their_group_nor_their_thread(size, sites, columns, drawn, seed):
    """Uneven blocks in any number: bit for bit what each has alone; and Babai's are the plain path's but near ties."""
    sizes, generator = block_sizes(sites, size), torch.Generator().manual_seed(seed)
    noise = torch.randn(len(sizes), size, 2 * size, generator=generator)
    held = torch.arange(size) < torch.tensor(sizes)[:, None]
    noise = noise * held[:, :, None]
    known = row_metric(noise @ noise.mT / (2 * size), sizes, floor=0.05, keep=0.7)
    metric = random_metric(columns, seed)
    basis = metric_factor(metric, torch.arange(columns), 0.01)
    row_steps, column_steps = (steps_of(exponents(x)) for x in (0.3 / known.lengths, basis.diagonal().reciprocal()))
    weight = 2 * torch.randn(sum(sizes), columns, generator=generator)
    pulls = (
        Pulls(torch.rand(sum(sizes), generator=generator), torch.rand(columns, generator=generator)) if drawn else None
    )

    def solved(own, blocks):
        given_ = weight[own], basis.float(), torch.arange(columns), row_steps[own], column_steps, blocks
        return unboxed_babai(*given_, None if pulls is None else Pulls(pulls.rows[own], pulls.columns))

    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(solved(slice(None), known))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    start = 0
    for block, count in list(enumerate(sizes))[:3]:
        own, start = slice(start, start + count), start + count
        assert torch.equal(solved(own, RowMetric(known.factor[block : block + 1], (count,))), found[0][own])
    steps = row_steps.double(), column_steps.double()
    plain = unboxed_babai(weight.double(), basis, torch.arange(columns), *steps, known, pulls)
    assert (plain == found[0]).float().mean() > 0.9
