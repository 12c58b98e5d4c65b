"""What codes cost: entropies against closed forms, the coder against the entropy, the control against its target."""

from __future__ import annotations

import math
from dataclasses import replace

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoquant.export.coder import Tables, encode, make_tables
from geoquant.export.decoder import decode_streams
from geoquant.export.matrices import Matrix, decode
from geoquant.lattice.rate import REACH, SIDE_BITS, class_histograms, code_bits, entropy_bits, site_bits, spread_of
from geoquant.lattice.rows import row_metric
from geoquant.methods import lattice, rtn
from geoquant.methods.problem import Problem
from geoquant.plan.rate import Forecast, RateControl, forecast
from oracles.lattice import random_metric


def codes_of(rows, columns, scale, seed=0, spread=0.5):
    """Rounded Gaussians whose spread follows row and column."""
    generator = torch.Generator().manual_seed(seed)
    row, column = (torch.exp(spread * torch.randn(size, generator=generator)) for size in (rows, columns))
    values = scale * torch.randn(rows, columns, generator=generator) * row[:, None] * column
    return torch.round(values).int()


def tables_of(*matrices):
    """Tables counted over some matrices, as the export does."""
    return make_tables(sum(class_histograms(codes, spread_of(codes)) for codes in matrices).numpy())


def matrix_of(codes, tables, rows=None):
    """A matrix as the export stores it, in streams of so many rows."""
    spread, step = spread_of(codes), rows or len(codes)
    side = (spread.rows.numpy(), spread.columns.numpy())
    parts = [slice(first, min(first + step, len(codes))) for first in range(0, len(codes), step)]
    coded = [encode(codes[part].numpy(), side[0][part], side[1], tables, tables.models()) for part in parts]
    sizes = [(part.stop - part.start, len(c.words), len(c.escapes)) for part, c in zip(parts, coded)]
    words, escapes = (np.concatenate([getattr(c, name) for c in coded]) for name in ("words", "escapes"))
    return Matrix(words, escapes, np.array(sizes, np.int32), *side)


def test_entropy_of_known_counts():
    assert entropy_bits(torch.tensor([[8, 8, 0], [0, 0, 5]])) == pytest.approx(16.0)
    assert entropy_bits(torch.tensor([[3, 1]])) == pytest.approx(-3 * math.log2(0.75) - math.log2(0.25))
    assert entropy_bits(torch.zeros(4, 3, dtype=torch.int64)) == 0.0


def test_histograms_count_every_code_in_its_class():
    codes = codes_of(40, 30, 2.0)
    spread = spread_of(codes)
    codes[2, 2] = -5000
    counts = class_histograms(codes, spread)
    classes = spread.classes()
    for row, column in ((0, 0), (39, 29), (7, 11)):
        at = (classes == classes[row, column]) & (codes == codes[row, column])
        assert counts[classes[row, column], codes[row, column] + REACH] == at.sum()
    assert counts.sum() == codes.numel()
    assert counts[:, -1].sum() == 1
    torch.testing.assert_close(spread.part(3, 9).classes(), classes[3:9])


def test_classes_find_the_spread():
    """Two kinds of rows and of columns: classed, they cost what each kind would cost alone."""
    generator = torch.Generator().manual_seed(3)
    row, column = torch.ones(400), torch.ones(300)
    row[::2], column[::3] = 8.0, 3.0
    codes = torch.round(2 * torch.randn(400, 300, generator=generator) * row[:, None] * column).int()
    alone = sum(
        entropy_bits(torch.bincount((part - part.min()).flatten())[None])
        for part in (codes[i::2][:, columns] for i in (0, 1) for columns in (column == 1, column == 3))
    )
    assert code_bits(codes, spread_of(codes)) == pytest.approx(alone, rel=0.004)


def test_a_site_pays_for_the_bytes_beside_its_codes():
    codes = codes_of(20, 50, 3.0)
    spread = spread_of(codes)
    assert site_bits(codes, spread, 0.5) - code_bits(codes, spread) == pytest.approx(SIDE_BITS * (20 + 25))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.3, 2.0, 90.0]),
    outlier=st.sampled_from([0, 128, -7000, 2**20]),
    seed=st.integers(0, 999),
)
def test_codes_survive_the_coder(rows, columns, scale, outlier, seed):
    """Any size, nearly nothing but zeros, values far beyond the tables."""
    codes = codes_of(rows, columns, scale, seed)
    if outlier:
        codes[seed % rows, seed % columns] = outlier
    tables = tables_of(codes)
    np.testing.assert_array_equal(*decode([matrix_of(codes, tables)], tables.lookup()), codes.numpy())


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=7),
    step=st.integers(1, 12),
    scale=st.sampled_from([0.0, 0.3, 2.0, 90.0]),
    outlier=st.sampled_from([0, -7000, 2**20]),
    seed=st.integers(0, 999),
)
def test_streams_of_several_matrices_are_decoded_together(shapes, step, scale, outlier, seed):
    """Any number of streams, more or fewer than are decoded at a time, long beside short, some of no words at all."""
    matrices = [codes_of(*shape, scale * (1 + index), seed + index) for index, shape in enumerate(shapes)]
    matrices.append(torch.zeros(5, 3, dtype=torch.int32))
    matrices[0][-1, -1] += outlier
    tables = tables_of(*matrices)
    found = decode([matrix_of(codes, tables, step) for codes in matrices], tables.lookup())
    for got, codes in zip(found, matrices, strict=True):
        assert got.dtype == (np.int32 if outlier == 2**20 else np.int16)
        np.testing.assert_array_equal(got, codes.numpy())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    streams_of=st.integers(0, 7),
    skew=st.floats(0.05, 5.0),
    seed=st.integers(0, 999),
)
def test_the_decoder_reads_what_constriction_writes(sizes, streams_of, skew, seed):
    """Random tables, some with counts of one beside tens of thousands, against the library's own decoder."""
    rng = np.random.default_rng(seed)
    tables = Tables(tuple(np.maximum(1, rng.gamma(skew, 2000 / skew, 2 * size + 2)).astype(np.int64) for size in sizes))
    models, lookup = tables.models(), tables.lookup()
    wanted, streams, rectangles, words, codes_before = [], [], [], [np.zeros(1, np.uint32)], 0
    for _ in range(streams_of):
        coder, parts = constriction.stream.stack.AnsCoder(), []
        for index in rng.permutation(len(sizes)):
            count = len(tables.counts[index])
            every = np.append(rng.permutation(count - 1), rng.choice(count - 1, rng.integers(0, 200)))
            parts.append((index, every.astype(np.int32)))
        for index, symbols in reversed(parts):
            coder.encode_reverse(symbols, models[index])
        begin = sum(map(len, words))
        words.append(coder.get_compressed())
        theirs = constriction.stream.stack.AnsCoder(words[-1])
        streams.append((begin, begin + len(words[-1]) - 1, 0, 0, len(rectangles), len(rectangles) + len(parts)))
        for index, symbols in parts:
            np.testing.assert_array_equal(theirs.decode(models[index], len(symbols)), symbols)
            wanted.append(symbols - tables.reach(index))
            rectangles.append((index, 0, 1, codes_before, codes_before + len(symbols)))
            codes_before += len(symbols)
    codes, none = np.zeros(codes_before, np.int16), np.zeros(0, np.int32)
    starts = np.array(streams, np.int64).reshape(-1, 6)
    places = (
        np.array(rectangles, np.int64).reshape(-1, 5),
        np.zeros(1, np.int64),
        np.arange(codes_before, dtype=np.uint32),
    )
    assert decode_streams(np.concatenate(words), none, starts, *places, *lookup.arrays, codes)
    np.testing.assert_array_equal(codes, np.concatenate([np.zeros(0, int), *wanted]))


def test_tables_without_counts_are_refused():
    with pytest.raises(ValueError, match="below one"):
        Tables((np.array([4, 0, 3, 1]),)).lookup()


@pytest.mark.parametrize("scale", [0.4, 1.5, 5.0])
def test_the_coder_takes_the_entropy_and_hardly_more(scale):
    """At most 0.02 bit per weight, with distributions shared by matrices of other shapes."""
    matrices = [codes_of(300, 400, scale, 1), codes_of(700, 200, 1.3 * scale, 2)]
    tables = tables_of(*matrices)
    models = tables.models()
    for codes in matrices:
        spread = spread_of(codes)
        side = (spread.rows.numpy().astype(int), spread.columns.numpy().astype(int))
        coded = encode(codes.numpy(), *side, tables, models)
        size = 32 * (len(coded.words) + len(coded.escapes))
        assert size / codes.numel() <= code_bits(codes, spread) / codes.numel() + 0.02


@pytest.mark.parametrize("rows", [30, 7, 13])
def test_a_stream_that_does_not_fit_is_noticed(rows):
    """Words and escapes too few, too many and not the right ones, in each of several streams."""
    codes = codes_of(30, 40, 2.0)
    codes[::2, 1] = 5000
    tables = tables_of(codes)
    good, lookup = matrix_of(codes, tables, rows), tables.lookup()
    for stream in range(len(good.sizes)):
        word, escape = good.sizes[:stream, 1:].sum(axis=0)
        more = good.sizes.copy()
        more[stream, 1] += 1
        fewer = good.sizes.copy()
        fewer[stream, 2] -= 1
        flipped = good.words.copy()
        flipped[word : word + 3] ^= np.uint32(0xA5A5A5A5)
        for change in (
            {"words": np.insert(good.words, word, 7), "sizes": more},
            {"escapes": np.delete(good.escapes, escape), "sizes": fewer},
            {"words": flipped},
        ):
            with pytest.raises(ValueError, match="does not end"):
                decode([good, replace(good, **change)], lookup)


@settings(max_examples=40, deadline=None)
@given(noise=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_noise_is_no_stream(noise, sizes):
    """Any words are read without harm, and refused."""
    codes = codes_of(len(sizes), 50, 4.0)
    tables = tables_of(codes)
    spread, rng = spread_of(codes), np.random.default_rng(noise)
    words = rng.integers(0, 2**32, sum(sizes), dtype=np.uint32)
    table = np.array([(1, size, 0) for size in sizes], np.int32)
    side = spread.rows.numpy(), spread.columns.numpy()
    with pytest.raises(ValueError, match="does not end"):
        decode([Matrix(words, np.zeros(0, np.int32), table, *side)], tables.lookup())


@pytest.mark.parametrize("sizes", [[[4, 9, 0]], [[-1, 9, 0], [6, 0, 0]], [[5, 0, 0], [0, 9, 0]], [[5, 9, 1]]])
def test_sizes_that_do_not_add_up_are_refused(sizes):
    side = np.zeros(5, np.int8), np.zeros(3, np.int8)
    matrix = Matrix(np.zeros(9, np.uint32), np.zeros(0, np.int32), np.array(sizes, np.int32), *side)
    lookup = tables_of(codes_of(5, 5, 1.0)).lookup()
    with pytest.raises(ValueError, match="sizes of the streams"):
        decode([matrix], lookup)
    with pytest.raises(ValueError, match="got 1 tables, wanted 48"):
        decode([matrix], Tables((np.array([4, 4, 3, 1]),)).lookup())


@pytest.mark.parametrize(("solve", "order"), [(lattice.solve, "activation"), (rtn.solve_lattice, "none")])
def test_a_forecast_meets_what_codes_really_cost(solve, order):
    """The metric that is solved with, hundreds of rows: within a tenth of a bit from 1.5 to 6 bits."""

    columns, rows = 160, 300
    generator = torch.Generator().manual_seed(0)
    metric = random_metric(columns, 4).float()
    weight = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    curvature = 0.05 + torch.rand(rows, generator=generator)
    rows_ = row_metric(curvature[:, None, None], (1,) * rows, floor=0.0, keep=1.0)
    known = forecast(weight, rows_.lengths, metric, order)
    for step in (0.1, 0.4, 1.2):
        options = {"order": order, "damping": 0.01, "step": step, "rows": rows_}
        codes = solve(Problem(weight, metric, **options)).codes
        real = site_bits(codes, spread_of(codes)) / codes.numel()
        assert known.at(math.log2(step)) == pytest.approx(real, abs=0.12), real


def test_a_forecast_between_and_beyond_its_samples():
    known = Forecast((-2.0, 0.0, 1.0), (5.0, 3.0, 2.5), 10)
    assert [known.at(step) for step in (-4.0, -2.0, -1.0, 0.5, 1.0, 9.0)] == [7.0, 5.0, 4.0, 2.75, 2.5, 2.5]


@settings(max_examples=40, deadline=None, derandomize=True)  # noise is drawn: a statistical test, fixed seeds
@given(
    target=st.floats(1.6, 7.5),
    bias=st.floats(-0.5, 0.5),
    noise=st.floats(0.0, 0.2),
    seed=st.integers(0, 999),
)
def test_the_whole_meets_its_rate_though_every_forecast_is_wrong(target, bias, noise, seed):
    """Forecasts off by a common bias, a bias of each kind and noise: the total within one per cent."""
    rng = np.random.default_rng(seed)
    steps = tuple(np.arange(-16.0, 2.0, 0.5).tolist())
    names = [(f"{block}.{kind}", kind) for block in range(24) for kind in "abcd"]
    weights = {"a": 900, "b": 300, "c": 3000, "d": 1500}
    levels = {name: rng.normal(0, 0.3) for name, _ in names}
    forecasts = {
        name: Forecast(steps, tuple(max(0.05, levels[name] - 8 - x) for x in steps), weights[kind])
        for name, kind in names
    }
    control = RateControl(target, forecasts, names)
    own = {kind: rng.normal(0, 0.2) for kind in "abcd"}
    for name, kind in names:
        step = control.step()
        real = max(0.02, forecasts[name].at(math.log2(step)) + bias + own[kind] + rng.normal(0, noise))
        control.record(name, step, real * weights[kind])
    total = sum(control.spent.values()) / sum(weights[kind] for _, kind in names)
    assert total == pytest.approx(target, rel=0.01)


def test_the_control_goes_on_where_it_was_stopped():
    """Told of what was solved, a new one gives the same steps."""
    steps = tuple(np.arange(-16.0, 2.0, 0.5).tolist())
    names = [(f"{block}.{kind}", kind) for block in range(6) for kind in "ab"]
    forecasts = {name: Forecast(steps, tuple(max(0.05, -8 - x) for x in steps), 100) for name, _ in names}
    first, seen = RateControl(3.0, forecasts, names), []
    for index, (name, _) in enumerate(names):
        seen.append((name, first.step(), 100 * (3.1 + 0.1 * (index % 3))))
        first.record(*seen[-1])
    second = RateControl(3.0, forecasts, names)
    for known in seen[:5]:
        second.record(*known)
    for name, step, bits in seen[5:]:
        assert second.step() == step
        second.record(name, step, bits)
