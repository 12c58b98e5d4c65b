"""Compiled loops over rows that know nothing of each other, a share of them on each of torch's threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

__all__ = ["in_parts"]


def in_parts(run: Callable[[slice], None], count: int) -> None:
    """`run` on slices that make up range(count). It must release Python's lock to gain anything."""
    threads = min(torch.get_num_threads(), count)
    bounds = [count * part // max(1, threads) for part in range(threads + 1)]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    waiting = [_pool(threads).submit(run, part) for part in parts[1:]]
    for part in parts[:1]:
        run(part)
    for future in waiting:
        future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="geoquant")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not follow into a child
