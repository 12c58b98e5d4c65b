"""The compiled side of `geoquant.export.packed`: rows of weights from nibbles, and `W x` for a few x without them.

A product for up to four tokens reads every packed byte once and writes nothing but y: a model that writes text waits
for its weights, and packed ones have a quarter of the bytes. All functions let go of Python's lock.

Arguments: dense (out, ceil(in / 2)) uint8 where `nibbles`, column j in the low half of byte j and column j +
ceil(in / 2) in the high half, each code plus 8; else (out, in) int8. pointers, places, excess: the rows of the
sparse list, its columns, and what is added to the largest or smallest code that the dense part holds (`most`,
`least`). Steps: the bits of bfloat16 numbers, int16. Rows `first` to `last` are done.
"""

from __future__ import annotations

import numpy as np

from geoquant.compiled import compiled

__all__ = ["dot", "dots", "weights"]


@compiled()
def floats(bits):  # pragma: no cover (compiled)
    """float32 of bfloat16 bits."""
    wide = np.empty(len(bits), np.int32)
    for i in range(len(bits)):
        wide[i] = np.int32(bits[i]) << np.int32(16)
    return wide.view(np.float32)


# Numbers are cast after every operation below: else the loops are compiled for integers of 64 bits.


@compiled()
def weights(
    dense, nibbles, pointers, places, excess, row_steps, column_steps, least, most, first, last, out, rounded
):  # pragma: no cover (compiled)
    """Write rows of `(code * a_i) * b_j` to `out` (last - first, in), float32: equal to torch's to the last bit.

    Where `rounded` (last - first, in) int16 has rows, out needs none: it gets the bits of the nearest bfloat16 numbers.
    """
    columns = len(column_steps)
    half = (columns + 1) // 2
    a, b = floats(row_steps), floats(column_steps)
    right, line = b[half:], np.empty(columns, np.float32)
    bits = line.view(np.int32)
    for i in range(first, last):
        step, packed = a[i], dense[i]
        row = line if len(rounded) else out[i - first]
        if nibbles:
            behind = row[half:]
            for j in range(half):
                row[j] = np.float32(np.int32(np.int32(packed[j] & np.uint8(15)) - np.int32(8))) * step * b[j]
            for j in range(len(behind)):
                behind[j] = np.float32(np.int32(np.int32(packed[j] >> np.uint8(4)) - np.int32(8))) * step * right[j]
        else:
            for j in range(columns):
                row[j] = np.float32(packed[j]) * step * b[j]
        for entry in range(pointers[i], pointers[i + 1]):
            beyond, j = np.int64(excess[entry]), places[entry]
            row[j] = np.float32(beyond + (most if beyond > 0 else least)) * step * b[j]
        if len(rounded):
            narrow = rounded[i - first]
            for j in range(columns):  # ties to even
                odd = np.int32(np.int32(bits[j] >> np.int32(16)) & np.int32(1))
                near = np.int32(np.int32(bits[j] + np.int32(0x7FFF)) + odd)
                narrow[j] = np.int16(np.int32(near >> np.int32(16)))


@compiled(fastmath={"reassoc", "contract", "nsz"})
def dot(
    x, dense, nibbles, pointers, places, excess, row_steps, column_steps, first, last, out
):  # pragma: no cover (compiled)
    """Write `W x` to `out` (out,), float32, in one pass over the packed bytes. x: (in,) float32."""
    columns = len(x)
    half = (columns + 1) // 2
    a, b = floats(row_steps), floats(column_steps)
    scaled, offset = np.zeros(2 * half, np.float32), np.float32(0)
    for j in range(columns):
        scaled[j] = x[j] * b[j]
        offset -= np.float32(8) * scaled[j]
    right = scaled[half:]
    for i in range(first, last):
        packed = dense[i]
        if nibbles:
            total = offset  # the nibbles are codes plus 8
            for j in range(half):
                total += np.float32(np.int32(packed[j] & np.uint8(15))) * scaled[j]
                total += np.float32(np.int32(packed[j] >> np.uint8(4))) * right[j]
        else:
            total = np.float32(0)
            for j in range(columns):
                total += np.float32(packed[j]) * scaled[j]
        for entry in range(pointers[i], pointers[i + 1]):
            total += np.float32(excess[entry]) * scaled[places[entry]]
        out[i] = total * a[i]


@compiled(fastmath={"reassoc", "contract", "nsz"})
def dots(
    x, dense, nibbles, pointers, places, excess, row_steps, column_steps, first, last, out
):  # pragma: no cover (compiled)
    """The same for four tokens at a time, in fewer passes. x: (tokens, in) float32, out: (tokens, out)."""
    tokens, columns = x.shape
    half = (columns + 1) // 2
    a, b = floats(row_steps), floats(column_steps)
    scaled, offset = np.zeros((4, 2 * half), np.float32), np.zeros(4, np.float32)
    s0, s1, s2, s3 = scaled[0], scaled[1], scaled[2], scaled[3]
    r0, r1, r2, r3 = s0[half:], s1[half:], s2[half:], s3[half:]
    for start in range(0, tokens, 4):
        count = min(4, tokens - start)
        for t in range(4):
            offset[t] = 0
            for j in range(columns):  # tokens that are not there are zeros
                scaled[t, j] = x[start + t, j] * b[j] if t < count else np.float32(0)
                offset[t] -= np.float32(8) * scaled[t, j]
        for i in range(first, last):
            packed = dense[i]
            if nibbles:
                t0, t1, t2, t3 = offset[0], offset[1], offset[2], offset[3]
                for j in range(half):
                    low = np.float32(np.int32(packed[j] & np.uint8(15)))
                    high = np.float32(np.int32(packed[j] >> np.uint8(4)))
                    t0 += low * s0[j] + high * r0[j]
                    t1 += low * s1[j] + high * r1[j]
                    t2 += low * s2[j] + high * r2[j]
                    t3 += low * s3[j] + high * r3[j]
            else:
                t0 = t1 = t2 = t3 = np.float32(0)
                for j in range(columns):
                    code = np.float32(packed[j])
                    t0 += code * s0[j]
                    t1 += code * s1[j]
                    t2 += code * s2[j]
                    t3 += code * s3[j]
            for entry in range(pointers[i], pointers[i + 1]):
                beyond, j = np.float32(excess[entry]), places[entry]
                t0 += beyond * s0[j]
                t1 += beyond * s1[j]
                t2 += beyond * s2[j]
                t3 += beyond * s3[j]
            out[start, i] = t0 * a[i]
            if count > 1:
                out[start + 1, i] = t1 * a[i]
            if count > 2:
                out[start + 2, i] = t2 * a[i]
            if count > 3:
                out[start + 3, i] = t3 * a[i]
