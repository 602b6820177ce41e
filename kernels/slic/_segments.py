"""Clusters to connected segments, compiled: the last part of `reference.py`."""

import numpy as np

from dop_fast.kernels.slic import _lanes, reference
from dop_fast.kernels.slic._base import WIDTH, address, compiled
from dop_fast.types import Array

_cut = compiled(reference.cut)


@compiled
def connect(found: Array, asked: int, runs: Array, labels: Array) -> None:
    """Do what `reference.connect` does on runs of equal labels in a row, found as bits."""
    height, width = labels.shape
    start, parent, part = runs[0], runs[1], runs[2]
    firsts = np.zeros(height + 1, np.int64)
    edges = np.zeros((2, found.shape[1] // 64), np.uint64)
    count = 0
    for y in range(height):
        here, above = edges[y % 2], edges[1 - y % 2]
        row, step = address(found, y) + np.uintp(4), np.uintp(found.strides[0])
        run_above = firsts[y - 1] - 1 if y > 0 else 0
        for word in range(len(here)):
            left = 64 * word
            at, run_here = row + np.uintp(4 * left), count - 1
            inside = ~np.uint64(0) >> np.uint64(max(0, left + 64 - width))
            here[word] = bits = _lanes.differ(at - np.uintp(4), at) & inside
            while bits != 0:
                start[count], parent[count] = left + _lanes.first_bit(bits), count
                bits &= bits - np.uint64(1)
                count += 1
            if y > 0:
                same = ~_lanes.differ(at, at - step) & inside
                # one pixel of each stretch in which both runs stay the same
                bits = same & (here[word] | above[word] | ~(same << np.uint64(1)))
                while bits != 0:
                    upto = bits ^ (bits - np.uint64(1))
                    i = run_above + _lanes.bit_count(above[word] & upto)
                    j = run_here + _lanes.bit_count(here[word] & upto)
                    # nearly always j is new, or known to belong to the run that i belongs to
                    if (parent[j] == j) | (parent[j] == parent[i]):
                        parent[j] = parent[i]
                    else:
                        _unite(parent, i, j)
                    bits &= bits - np.uint64(1)
                run_above += _lanes.bit_count(above[word])
        firsts[y + 1] = count
    _parts(start, parent, part, firsts, count, asked, labels)


@compiled
def _unite(parent: Array, i: int, j: int) -> None:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    while parent[j] != j:
        parent[j] = parent[parent[j]]
        j = parent[j]
    parent[max(i, j)] = min(i, j)


@compiled
def _parts(
    start: Array, parent: Array, part: Array, firsts: Array, count: int, asked: int, labels: Array
) -> None:
    height, width = labels.shape
    sizes, before = np.zeros(count, np.int64), np.zeros(count, np.int64)
    parts = 0
    for y in range(height):
        for k in range(firsts[y], firsts[y + 1]):
            stop = start[k + 1] if k + 1 < firsts[y + 1] else width
            if parent[k] == k:
                part[k] = parts
                if start[k] > 0:
                    before[parts] = part[k - 1]
                elif y > 0:
                    before[parts] = part[firsts[y - 1]]
                parts += 1
            else:
                parent[k] = parent[parent[k]]
                part[k] = part[parent[k]]
            sizes[part[k]] += stop - start[k]
    final = np.empty(parts, np.int32)
    kept = _merge(sizes[:parts], before, height * width, asked, final)
    end = address(labels, height)
    for y in range(height):
        row = address(labels, y)
        for k in range(firsts[y], firsts[y + 1]):
            stop = start[k + 1] if k + 1 < firsts[y + 1] else width
            value = final[part[k]]
            # whole vectors: the next run writes over what is too much
            for x in range(start[k], stop, WIDTH):
                at = row + np.uintp(4 * x)
                if at + np.uintp(4 * WIDTH) <= end:
                    _lanes.fill(at, value)
                else:
                    labels[y, x:stop] = value
    _cut(labels, kept, asked)


@compiled
def _merge(sizes: Array, before: Array, area: int, asked: int, final: Array) -> int:
    """Write to `final` int32[c] each component's segment; return the number of segments."""
    count = len(sizes)
    kept = np.empty(count, np.bool_)
    for k in range(count):
        kept[k] = k == 0 or 4 * asked * sizes[k] >= area
    joined = _resolve(kept, before, sizes, final)
    if 4 * asked * joined[0] < area:
        for k in range(1, count):
            if kept[k]:
                kept[k] = False
                break
    joined = _resolve(kept, before, sizes, final)
    number = kept.sum()
    excess = number - asked - max(1, asked // 20)
    for _ in range(excess):
        smallest = 0
        for k in range(1, count):
            if kept[k] and (smallest == 0 or joined[k] < joined[smallest]):
                smallest = k
        kept[smallest] = False
    number -= max(excess, 0)
    joined = _resolve(kept, before, sizes, final)
    rank = 0
    for k in range(count):
        if kept[k]:
            final[k] = rank
            rank += 1
        else:
            final[k] = final[before[k]]
    return rank


@compiled
def _resolve(kept: Array, before: Array, sizes: Array, final: Array) -> Array:
    """Return the sizes of the kept components together with those that join them."""
    joined = np.zeros(len(kept), np.int64)
    for k in range(len(kept)):
        final[k] = k if kept[k] else final[before[k]]
        joined[final[k]] += sizes[k]
    return joined
