"""GPTQ tensors read bit by bit, as docs/formats.md describes them; shares nothing with the packer."""

from __future__ import annotations

import numpy as np


def stream(words: np.ndarray, count: int, bits: int) -> list[int]:
    """`count` codes of `bits` bits from one line of int32 words: bit k of the line is bit k % 32 of word k // 32."""
    line = "".join(format(int(word) & 0xFFFFFFFF, "032b")[::-1] for word in words)
    assert len(line) == 32 * -(-count * bits // 32)
    assert "1" not in line[count * bits :]
    return [int(line[j * bits : (j + 1) * bits][::-1], 2) for j in range(count)]


def decode(tensors: dict, name: str, config: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (out, in), zero points (out, groups) and float32 weights (out, in) of one site in a GPTQ file."""
    qweight, qzeros, scales, index = (
        tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert (qweight.dtype, qzeros.dtype, scales.dtype, index.dtype) == ("int32", "int32", "float16", "int32")
    bits, rows, columns = config["bits"], scales.shape[1], index.shape[0]
    codes = np.array([stream(qweight[:, row], columns, bits) for row in range(rows)])
    zeros = np.array([stream(line, rows, bits) for line in qzeros]).T
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    weights = np.empty((rows, columns), np.float32)
    for column, group in enumerate(index):
        weights[:, column] = scales[group].astype(np.float32) * (codes[:, column] - zeros[:, group])
    return codes, zeros, weights
