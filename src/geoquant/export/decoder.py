"""The decoder of coded tensors, compiled: constriction's ANS streams, four side by side, free of Python's lock.

A stream is that of constriction's `AnsCoder`: 32-bit words read from the end, a state of 64 bits, probabilities of 24.
Every symbol waits for the state that the one before it left, some twenty cycles in which a core could do several times
the work: so four streams take turns, symbol by symbol. What they decode are symbols in the order of the stream, a
rectangle at a time; a rectangle's symbols become codes in their places when it is complete. The inner loop knows
nothing of rows, columns and escapes.

Nothing outside of the arrays is read or written, whatever the words are: a stream takes no word of its neighbour, and
the intervals of a table cover all points. A stream decoded with other tables than its own does not end where it should.
A test compares this decoder and constriction's on random tables.
"""

from __future__ import annotations

import numpy as np

from geoquant.compiled import compiled

__all__ = ["decode_streams"]

# Bits of a probability, of a slot's number and of a symbol. They are here because numba's cache knows this file alone.
PRECISION, LOOKUP, SYMBOL = 24, 11, 16
LANES = 4
# What a lane holds: first and next of its words, next and end of its escapes, rectangle and end of its rectangles, how
# many symbols the rectangle lacks, and which row of `symbols` takes them.
FIRST, WORD, ESCAPE, ESCAPES, RECTANGLE, RECTANGLES, LEFT, OUT = range(8)

FULL, HALF, SHIFT = np.uint64(PRECISION), np.uint64(32), np.uint64(PRECISION - LOOKUP)
UPPER, LOWER, ONE = np.uint64(PRECISION + SYMBOL), np.uint64(SYMBOL), np.uint64(1)
MASK, LAST = np.uint64((1 << PRECISION) - 1), np.uint64((1 << SYMBOL) - 1)


@compiled()
def decode_streams(
    words, escapes, streams, rectangles, rows, columns, slots, intervals, starts, reaches, codes
):  # pragma: no cover (compiled)
    """Decode streams into `codes`, flat, signed; whether all end where their codes do.

    words: uint32, one more in front of all. escapes: int32 values beyond their tables. streams: (n, 6) first and last
    word, begin and end of the escapes and of the rectangles of each. rectangles: (m, 5) class, first and last row,
    first and last column; rows: where each row begins in codes; columns: where a code lies in its row. The rest as in
    `Lookup`.
    """
    largest = 0
    for index in range(len(rectangles)):
        largest = max(largest, area(rectangles[index]))
    symbols = np.empty((LANES, largest), np.uint16)
    lanes, states = np.zeros((LANES, 8), np.int64), np.zeros(LANES, np.uint64)
    for index in range(LANES):
        lanes[index, OUT] = index
    busy = begun = 0
    while True:  # loops instead of slices: those take numba seconds to compile
        while busy < LANES and begun < len(streams):
            for field in range(LEFT):
                lanes[busy, field] = streams[begun, field]
            states[busy] = fill(words, lanes[busy])
            lanes[busy, LEFT] = area(rectangles[lanes[busy, RECTANGLE]])
            begun, busy = begun + 1, busy + 1
        if busy == 0:
            return True
        steps = largest
        for index in range(LANES):
            if index >= busy:  # without words and with room: it may run, and nobody looks at its symbols
                for field in range(LEFT):
                    lanes[index, field] = 0
                lanes[index, FIRST], lanes[index, LEFT] = 1, largest
            steps = min(steps, lanes[index, LEFT])
        if busy == 1:
            run_one(words, rectangles, slots, intervals, starts, lanes, states, symbols, steps)
        else:
            run_all(words, rectangles, slots, intervals, starts, lanes, states, symbols, steps)
        for index in range(busy - 1, -1, -1):
            lane = lanes[index]
            lane[LEFT] -= steps
            if lane[LEFT] > 0:
                continue
            if not place(symbols[lane[OUT]], rectangles[lane[RECTANGLE]], escapes, lane, rows, columns, reaches, codes):
                return False
            lane[RECTANGLE] += 1
            if lane[RECTANGLE] < lane[RECTANGLES]:
                lane[LEFT] = area(rectangles[lane[RECTANGLE]])
                continue
            if lane[ESCAPE] < lane[ESCAPES] or lane[WORD] >= lane[FIRST] or states[index] != 0:
                return False
            busy -= 1
            states[index] = states[busy]
            for field in range(OUT + 1):
                lane[field], lanes[busy, field] = lanes[busy, field], lane[field]


@compiled()
def area(rectangle):  # pragma: no cover (compiled)
    """Codes of a rectangle."""
    return (rectangle[2] - rectangle[1]) * (rectangle[4] - rectangle[3])


@compiled()
def fill(words, lane):  # pragma: no cover (compiled)
    """The first state of a stream."""
    state = np.uint64(0)
    while lane[WORD] >= lane[FIRST] and state >> HALF == 0:
        state = (state << HALF) | np.uint64(words[lane[WORD]])
        lane[WORD] -= 1
    return state


@compiled()
def step(state, words, word, first, slots, intervals):  # pragma: no cover (compiled)
    """One symbol: the next state, the next word, the symbol."""
    point = state & MASK
    interval = slots[point >> SHIFT]
    while point - (interval >> UPPER) >= ((interval >> LOWER) & MASK):
        interval = intervals[(interval & LAST) + ONE]
    state = (state >> FULL) * ((interval >> LOWER) & MASK) + (point - (interval >> UPPER))
    # No branch, which nobody could predict: the next word is read in any case, and one lies in front of all.
    more = (state << HALF) | np.uint64(words[word])
    taken = (state >> HALF == 0) & (word >= first)
    return (more if taken else state), word - np.uint64(taken), np.uint16(interval & LAST)


@compiled()
def lane_of(index, rectangles, slots, intervals, starts, lanes, states, symbols):  # pragma: no cover (compiled)
    """What `step` needs of a lane, and where its symbols go."""
    lane = lanes[index]
    kind = rectangles[lane[RECTANGLE], 0]
    return (
        states[index],
        np.uint64(lane[WORD]),
        np.uint64(lane[FIRST]),
        slots[kind],
        intervals[starts[kind] :],
        symbols[lane[OUT], symbols.shape[1] - lane[LEFT] :],
    )


@compiled()
def run_one(words, rectangles, slots, intervals, starts, lanes, states, symbols, steps):  # pragma: no cover (compiled)
    """Decode some symbols of the first lane."""
    s, w, f, k, i, o = lane_of(0, rectangles, slots, intervals, starts, lanes, states, symbols)
    for t in range(steps):
        s, w, o[t] = step(s, words, w, f, k, i)
    states[0], lanes[0, WORD] = s, w


@compiled()
def run_all(words, rectangles, slots, intervals, starts, lanes, states, symbols, steps):  # pragma: no cover (compiled)
    """Decode some symbols of every lane; lanes are variables, so that they stay in registers."""
    s0, w0, f0, k0, i0, o0 = lane_of(0, rectangles, slots, intervals, starts, lanes, states, symbols)
    s1, w1, f1, k1, i1, o1 = lane_of(1, rectangles, slots, intervals, starts, lanes, states, symbols)
    s2, w2, f2, k2, i2, o2 = lane_of(2, rectangles, slots, intervals, starts, lanes, states, symbols)
    s3, w3, f3, k3, i3, o3 = lane_of(3, rectangles, slots, intervals, starts, lanes, states, symbols)
    for t in range(steps):
        s0, w0, o0[t] = step(s0, words, w0, f0, k0, i0)
        s1, w1, o1[t] = step(s1, words, w1, f1, k1, i1)
        s2, w2, o2[t] = step(s2, words, w2, f2, k2, i2)
        s3, w3, o3[t] = step(s3, words, w3, f3, k3, i3)
    states[0], states[1], states[2], states[3] = s0, s1, s2, s3
    lanes[0, WORD], lanes[1, WORD], lanes[2, WORD], lanes[3, WORD] = w0, w1, w2, w3


@compiled()
def place(symbols, rectangle, escapes, lane, rows, columns, reaches, codes):  # pragma: no cover (compiled)
    """Write the codes of a rectangle, whose symbols are the last ones; whether there are enough escapes."""
    reach, width = reaches[rectangle[0]], rectangle[4] - rectangle[3]
    run, index = columns[rectangle[3] : rectangle[4]], len(symbols) - area(rectangle)
    for r in range(rectangle[1], rectangle[2]):
        row = codes[rows[r] :]
        part = symbols[index : index + width]
        most = 0
        for c in range(width):
            value = np.int64(part[c]) - reach
            row[run[c]] = value
            most = max(most, value)
        index += width
        if most > reach:
            for c in range(width):
                if part[c] > 2 * reach:
                    if lane[ESCAPE] == lane[ESCAPES]:
                        return False
                    row[run[c]] = escapes[lane[ESCAPE]]
                    lane[ESCAPE] += 1
    return True
