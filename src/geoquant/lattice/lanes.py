"""Blocks of rows side by side: the recursion of LANES blocks at a time, one in each lane of a vector.

Inside a column row i of a block waits for the errors of the rows before it, so that one block alone leaves most of a
processor waiting. Blocks know nothing of each other. In memory row i of block b therefore stands beside row i of the
other blocks of its group: `(group, i, lane)`, one such line per column of the layer. Blocks that are short, and lanes
without a block, are filled up with rows of zeros, which get codes of zero and move nothing.

A vector of LANES floats is a type of numba's here: its compiler makes such vectors of loops over rows that stand side
by side only where it can prove that nothing overlaps, and for short loops never. It and the functions on it stand in
one file, since numba's cache knows no other.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, register_model

from geoquant.compiled import compiled

__all__ = ["LANES", "SUB", "pack", "panel", "unpack"]

LANES = 16  # blocks that take turns; a register of AVX-512, two or four elsewhere
SUB = 4  # rows whose errors move the later ones together

VECTOR = ir.VectorType(ir.FloatType(), LANES)
INDEX = ir.IntType(32)


class Lanes(types.Type):
    """LANES floats."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes{LANES}")


lanes = Lanes()


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: object, kind: types.Type) -> None:
        super().__init__(manager, kind, VECTOR)


def _pointer(context, builder, kind, array, at):
    if kind.dtype != types.float32 or kind.layout != "C":
        raise TypingError(f"lanes are of float32 without gaps, got {kind}")
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), VECTOR.as_pointer())


def _call(builder, name, *given):
    """One of LLVM's own functions, of vectors."""
    known = ir.FunctionType(VECTOR, [VECTOR] * len(given))
    return builder.call(cgutils.get_or_insert_function(builder.module, known, f"llvm.{name}.v{LANES}f32"), given)


def _all(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


@intrinsic
def load(context, array, at):
    """Lanes `at` and after of a one-dimensional array without gaps."""

    def code(context, builder, signature, given):
        return builder.load(_pointer(context, builder, signature.args[0], *given), align=4)

    return lanes(array, types.intp), code


@intrinsic
def store(context, array, at, value):
    """What `load` finds afterwards."""

    def code(context, builder, signature, given):
        builder.store(given[2], _pointer(context, builder, signature.args[0], *given[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), code


@intrinsic
def store_integers(context, array, at, value):
    """The same as integers of the type of the array, which hold them; what is in none, or no number, as -2^31."""

    def code(context, builder, signature, given):
        array, at, value = given
        inside = builder.fcmp_ordered("<", _call(builder, "fabs", value), _all(2.0**31))
        kind = ir.VectorType(ir.IntType(signature.args[0].dtype.bitwidth), LANES)
        whole = builder.fptosi(builder.select(inside, value, _all(-(2.0**31))), kind)
        data = context.make_array(signature.args[0])(context, builder, array).data
        place = builder.bitcast(builder.gep(data, [at]), kind.as_pointer())
        builder.store(whole, place, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), code


@intrinsic
def splat(context, value):
    """A float in every lane."""

    def code(context, builder, signature, given):
        nothing, first = ir.Constant(VECTOR, ir.Undefined), ir.Constant(INDEX, 0)
        one = builder.insert_element(nothing, given[0], first)
        return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(INDEX, LANES), [0] * LANES))

    return lanes(types.float32), code


@intrinsic
def times(context, a, b):
    """`a b`."""
    return lanes(lanes, lanes), lambda context, builder, signature, given: builder.fmul(*given)


@intrinsic
def over(context, a, b):
    """`a / b`."""
    return lanes(lanes, lanes), lambda context, builder, signature, given: builder.fdiv(*given)


@intrinsic
def turn(context, tile):
    """Transpose a square of LANES rows that follow each other: interleave halves as often as 2 divides LANES."""

    def code(context, builder, signature, given):
        places = [ir.Constant(ir.IntType(64), lane * LANES) for lane in range(LANES)]
        places = [_pointer(context, builder, signature.args[0], given[0], place) for place in places]
        square, half = [builder.load(place, align=4) for place in places], LANES // 2
        low = [lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
        masks = [ir.Constant(ir.VectorType(INDEX, LANES), [more + lane for lane in low]) for more in (0, half)]
        for _ in range(half.bit_length()):
            pairs = zip(square[:half], square[half:])
            square = [builder.shuffle_vector(*pair, mask) for pair in pairs for mask in masks]
        for row, place in zip(square, places):
            builder.store(row, place, align=4)
        return context.get_dummy_value()

    return types.void(tile), code


@intrinsic
def more(context, a, b):
    """`1 + a b`."""

    def code(context, builder, signature, given):
        return _call(builder, "fmuladd", *given, _all(1.0))

    return lanes(lanes, lanes), code


@intrinsic
def drawn(context, a, by):
    """`a / by`, but never further than one from a."""

    def code(context, builder, signature, given):
        one, a = _all(1.0), given[0]
        low, high = builder.fsub(a, one), builder.fadd(a, one)
        near = builder.fdiv(*given)
        near = builder.select(builder.fcmp_ordered("<", near, low), low, near)
        return builder.select(builder.fcmp_ordered(">", near, high), high, near)

    return lanes(lanes, lanes), code


@intrinsic
def minus(context, a, b, c):
    """`a - b c`, rounded once where the processor can."""

    def code(context, builder, signature, given):
        return _call(builder, "fmuladd", builder.fneg(given[1]), given[2], given[0])

    return lanes(lanes, lanes, lanes), code


@intrinsic
def rint(context, a):
    """The nearest integers, of two the even one."""
    return lanes(lanes), lambda context, builder, signature, given: _call(builder, "rint", *given)


@compiled(fastmath={"contract"})
def panel(centres, work, steps, shares, feedback, first, last, row_pulls, column_pulls):  # pragma: no cover (compiled)
    """Quantize the columns of a panel in rows `first` to `last`, in place; groups of rows as the module says.

    centres:  (p, rows) what to round, one row of memory per column of the layer; becomes the codes.
    work:     (p, rows) weights, which become the errors `w - q`.
    steps:    (p,) step per column. shares: (p, p) `V_kj / V_jj` of the panel.
    feedback: (size, size * LANES) unit upper triangular row factors of the group, size a multiple of SUB; None where
              no row moves another.

    row_pulls: (rows,) and column_pulls: (p,) what a centre is divided by is one and their product (`lattice/priced`);
              None: every code is the nearest.
    """
    wide = last - first
    for j in range(len(steps)):
        # Views that start at zero: the compiler vectorises loops over them, and not over offsets.
        own, errors = centres[j, first:last], work[j, first:last]
        _gather(own, work, shares, j, first, last)
        step, inverse = splat(steps[j]), splat(np.float32(1.0) / steps[j])
        pulls = None if row_pulls is None else (row_pulls[first:last], splat(column_pulls[j]))
        if feedback is None:
            for at in range(0, wide, LANES):
                _round(load(own, at), own, errors, at, step, inverse, pulls)
            continue
        # A row waits for the one before it. So that it need not wait for much else, errors go to the next few rows at
        # once and to the others together.
        for sub in range(0, len(feedback), SUB):
            one, two, three, four = feedback[sub], feedback[sub + 1], feedback[sub + 2], feedback[sub + 3]
            at = sub * LANES
            w = _round(load(own, at), own, errors, at, step, inverse, pulls)
            at += LANES
            x = _round(minus(load(own, at), w, load(one, at)), own, errors, at, step, inverse, pulls)
            at += LANES
            value = minus(minus(load(own, at), w, load(one, at)), x, load(two, at))
            y = _round(value, own, errors, at, step, inverse, pulls)
            at += LANES
            value = minus(minus(minus(load(own, at), w, load(one, at)), x, load(two, at)), y, load(three, at))
            z = _round(value, own, errors, at, step, inverse, pulls)
            for at in range((sub + SUB) * LANES, wide, LANES):
                value = minus(minus(load(own, at), w, load(one, at)), x, load(two, at))
                store(own, at, minus(minus(value, y, load(three, at)), z, load(four, at)))


@compiled(fastmath={"contract"})
def _round(value, codes, errors, at, step, inverse, pulls):  # pragma: no cover (compiled)
    """Write the codes of one row of each block, and return how far they are from what was to be rounded."""
    if pulls is None:
        code = rint(times(value, inverse))
    else:
        rows, column = pulls
        code = rint(drawn(times(value, inverse), more(load(rows, at), column)))
    store(codes, at, code)
    store(errors, at, minus(load(errors, at), code, step))
    return minus(value, code, step)


@compiled(fastmath={"contract"})
def _gather(own, work, shares, j, first, last):  # pragma: no cover (compiled)
    """Add to `own` its shares of the errors of the columns before j, four columns at a time."""
    whole = j - j % 4
    for k in range(0, whole, 4):
        a, b, c, d = shares[k, j], shares[k + 1, j], shares[k + 2, j], shares[k + 3, j]
        one, two, three, four = (
            work[k, first:last],
            work[k + 1, first:last],
            work[k + 2, first:last],
            work[k + 3, first:last],
        )
        for i in range(len(own)):
            own[i] += a * one[i] + b * two[i] + c * three[i] + d * four[i]
    for k in range(whole, j):
        share, errors = shares[k, j], work[k, first:last]
        for i in range(len(own)):
            own[i] += share * errors[i]


@compiled()
def pack(weight, row_steps, rows, places, work, first, last):  # pragma: no cover (compiled)
    """Weights in units of their rows' steps, from `first` to `last` of their slots.

    weight: (out, in). rows: (slots,) row in each slot of a line, -1 of one without. places: (in,) line of each column.
    work: (in, slots).
    """
    columns = weight.shape[1]
    whole = columns - columns % LANES
    tile = np.zeros(LANES * LANES, dtype=np.float32)
    steps = np.full(last - first, np.inf, dtype=np.float32)
    for at in range(first, last):
        if rows[at] >= 0:
            steps[at - first] = row_steps[rows[at]]
    for at in range(first, last, LANES):
        for begin in range(0, columns, LANES):
            for lane in range(LANES):
                own = weight[max(rows[at + lane], 0)]
                if begin < whole:
                    store(tile, lane * LANES, load(own, begin))
                else:
                    for j in range(columns - whole):
                        tile[lane * LANES + j] = own[whole + j]
            turn(tile)
            for j in range(min(LANES, columns - begin)):
                store(work[places[begin + j]], at, over(load(tile, j * LANES), load(steps, at - first)))


@compiled()
def unpack(work, rows, places, codes, first, last):  # pragma: no cover (compiled)
    """codes: (out, in) integers, from floats as `pack` lays them out; one that fits into none is the least there is."""
    columns = codes.shape[1]
    whole = columns - columns % LANES
    tile, some = np.zeros(LANES * LANES, dtype=np.float32), np.zeros(LANES, dtype=codes.dtype)
    for at in range(first, last, LANES):
        for begin in range(0, columns, LANES):
            for j in range(min(LANES, columns - begin)):
                store(tile, j * LANES, load(work[places[begin + j]], at))
            turn(tile)
            for lane in range(LANES):
                row = rows[at + lane]
                if row >= 0 and begin < whole:
                    store_integers(codes[row], begin, load(tile, lane * LANES))
                elif row >= 0:
                    store_integers(some, 0, load(tile, lane * LANES))
                    for j in range(columns - whole):
                        codes[row, whole + j] = some[j]
