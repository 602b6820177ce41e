"""SLIC superpixels (Achanta et al., 2012) in plain NumPy: what `cpu.py` computes, bit for bit.

All sums and distances are integers, so their order does not matter:

* colours are CIELAB in 1/64, centres in 1/128, and positions in 1/16 pixel;
* the distance of a pixel P to a centre C, |P - C|^2 + (compactness / S)^2 |xy|^2, is kept
  without the |P|^2 that all candidates share, in 1/8192 of a squared Lab unit;
* its lowest bits are replaced by the cluster's number, so that one minimum finds the winner
  (the lowest number on a tie);
* a cluster is a candidate for whole tiles of 8 x 16 pixels: those within S + 2 of its centre.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from dop_fast.types import Array

TILE_HEIGHT, TILE_WIDTH = 8, 16
FAR = 2**29
"""Limit of the spatial distance along one axis: above any distance of two sRGB colours."""
COARSE_SHARE = 0.7
"""Share of the iterations that `coarse` runs at half resolution."""
CUBE_ROOT_BITS = np.float32(0x54A26000)
"""Makes bits(t) / -3 a first guess of t^(-1/3)."""


class Grid(NamedTuple):
    """What depends only on the image's size and the settings of one resolution.

    `weight` float32: of a squared distance in 1/16 pixel; `shift`: bits that all distances drop
    to fit in 32 (0 up to compactness 128); `reach`: of a cluster beyond its tile, 1/16 pixel.
    """

    height: int
    width: int
    clusters: int
    weight: np.float32
    shift: int
    reach: int


def slic(
    images: NDArray[np.uint8],
    n_segments: tuple[int, ...],
    compactness: float,
    sigma: float,
    iterations: int,
    coarse: bool,
) -> NDArray[np.int32]:
    """Return labels int32[n r h w] of `images` [n h w 3]; see `dop_fast.kernels.slic.slic`."""
    labels = np.empty((len(images), len(n_segments), *images.shape[1:3]), np.int32)
    for image, out in zip(images, labels, strict=True):
        planes = blur(lab(image), taps(sigma))
        for asked, result in zip(n_segments, out, strict=True):
            clusters = min(asked, result.size)
            found = segment(planes, clusters, compactness, iterations, coarse)
            result[:] = connect(found, clusters)
    return labels


def segment(
    planes: NDArray[np.int16], clusters: int, compactness: float, iterations: int, coarse: bool
) -> NDArray[np.int32]:
    """Return each pixel's cluster int32[h w] after `iterations` of assignment."""
    fine = grid(planes.shape[1], planes.shape[2], clusters, compactness)
    colours, places = seeds(planes, clusters)
    halved = int(COARSE_SHARE * iterations) if coarse else 0
    if halved:
        small = halve(planes)
        half = grid(small.shape[1], small.shape[2], clusters, compactness)
        places = (places - 8) // 2
        for _ in range(halved):
            labels = assign(small, colours, places, half)
            colours, places = update(small, labels, colours, places)
        places = 2 * places + 8
    for _ in range(iterations - halved - 1):
        labels = assign(planes, colours, places, fine)
        colours, places = update(planes, labels, colours, places)
    return assign(planes, colours, places, fine)


# colours


def lab_tables() -> NDArray[np.uint64]:
    """Return uint64[3 256]: what a byte of R, G, B adds to X, Y and Z, 21 bits each.

    X, Y, Z are relative to the D65 white, in units of 2^-20.
    """
    value = np.arange(256) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    to_xyz = np.array(
        [
            [0.412453, 0.357580, 0.180423],
            [0.212671, 0.715160, 0.072169],
            [0.019334, 0.119193, 0.950227],
        ]
    )
    white = np.array([0.95047, 1.0, 1.08883])
    parts = np.rint(2.0**20 * (to_xyz / white[:, None])[:, :, None] * linear).astype(np.uint64)
    packed = parts[0] | parts[1] << np.uint64(21) | parts[2] << np.uint64(42)
    return np.asarray(packed, np.uint64)


def lab(image: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Return L, a, b int16[3 h w] in 1/64 of uint8[h w 3]; within 0.03 of CIELAB."""
    red, green, blue = lab_tables()
    packed = red[image[..., 0]] + green[image[..., 1]] + blue[image[..., 2]]
    fx, fy, fz = (_root(packed >> np.uint64(shift) & np.uint64(0x1FFFFF)) for shift in (0, 21, 42))
    lightness = np.float32(64 * 116) * fy - np.float32(64 * 16)
    a = np.float32(64 * 500) * (fx - fy)
    b = np.float32(64 * 200) * (fy - fz)
    # truncation after an offset rounds negative numbers like positive ones
    rounded = (np.stack([lightness, a, b]) + np.float32(8192.5)).astype(np.int32) - 8192
    return rounded.astype(np.int16)


def _root(parts: Array) -> NDArray[np.float32]:
    """Return CIELAB's f, a cube root, linear near black, by Newton steps without division."""
    t = parts.astype(np.int32).astype(np.float32) * np.float32(2.0**-20)
    third = np.float32(1 / 3)
    guess = CUBE_ROOT_BITS - np.maximum(t, third / 1024).view(np.int32).astype(np.float32) * third
    r = guess.astype(np.int32).view(np.float32)
    for _ in range(2):
        r = r * (np.float32(4 / 3) - t * third * r * (r * r))
    linear = np.float32(7.787) * t + np.float32(16 / 116)
    return np.where(t > np.float32(0.008856), t * (r * r), linear)


def taps(sigma: float) -> NDArray[np.int16]:
    """Return the Gaussian's weights at distance 1, 2 ... 4 sigma in 2^-16; none for sigma 0."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return np.zeros(0, np.int16)
    weight = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    share = weight[1:] / (weight[0] + 2 * weight[1:].sum())
    return np.asarray(np.rint(share * 2**16).astype(np.int16))


def mirror(size: int, radius: int) -> NDArray[np.int32]:
    """Return the index int32[size + 2 radius] that extends an axis: c b a | a b c | c b a."""
    index = np.arange(-radius, size + radius) % (2 * size)
    return np.minimum(index, 2 * size - 1 - index).astype(np.int32)


def blur(planes: NDArray[np.int16], weights: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the planes [3 h w] blurred along rows, then columns; flat areas stay exact."""
    for axis in (2, 1):
        size, radius = planes.shape[axis], len(weights)
        padded = planes.astype(np.int32).take(mirror(size, radius), axis=axis)
        here = padded.take(np.arange(radius, radius + size), axis=axis)
        total = here.copy()
        for k, weight in enumerate(weights, start=1):
            before = padded.take(np.arange(radius - k, radius - k + size), axis=axis)
            after = padded.take(np.arange(radius + k, radius + k + size), axis=axis)
            total += (before + after - 2 * here) * int(weight) >> 16
        planes = total.astype(np.int16)
    return planes


def halve(planes: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the means of 2 x 2 pixels; an odd last row or column is repeated."""
    odd = [(0, 0), (0, planes.shape[1] % 2), (0, planes.shape[2] % 2)]
    padded = np.pad(planes.astype(np.int32), odd, mode="edge")
    rows = padded[:, ::2] + padded[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2] + 2 >> 2).astype(np.int16)


# clusters


def grid(height: int, width: int, clusters: int, compactness: float) -> Grid:
    """Return the constants of one resolution."""
    side = np.sqrt(height * width / clusters)
    shift = max(0, int(np.ceil(2 * np.log2(compactness / 128))))
    weight = np.float32(8192 / 256 * 2.0**-shift * (compactness / side) ** 2)
    return Grid(height, width, clusters, weight, shift, int(16 * side) + 32)


def seeds(planes: NDArray[np.int16], clusters: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return colours int32[k 3] and places int32[k 2] (x, y) of exactly k seeds.

    They lie in rows of about square cells; the rows' numbers of cells differ by at most one.
    """
    height, width = planes.shape[1:]
    rows = int(np.sqrt(clusters * height / width) + 0.5)
    rows = min(max(rows, 1, -(-clusters // width)), height, clusters)
    colours, places = np.empty((clusters, 3), np.int32), np.empty((clusters, 2), np.int32)
    for row in range(rows):
        first, last = row * clusters // rows, (row + 1) * clusters // rows
        for column in range(last - first):
            x = (2 * column + 1) * width * 8 // (last - first) - 8
            y = (2 * row + 1) * height * 8 // rows - 8
            places[first + column, 0], places[first + column, 1] = x, y
            for channel in range(3):
                seed = planes[channel, (y + 8) // 16, (x + 8) // 16]
                colours[first + column, channel] = 2 * np.int32(seed)
    return colours, places


def tiles(place: int, size: int, tile: int, reach: int) -> tuple[int, int]:
    """Return the first and one past the last tile along an axis within `reach` of `place`."""
    first = (place - reach + 15) // (16 * tile)
    last = (place + reach) // (16 * tile) + 1
    return max(first, 0), min(last, (size + tile - 1) // tile)


def reach_in_row(y: int, row: int, reach: int) -> int:
    """Return how far a cluster at `y` within reach of a row of tiles reaches along that row."""
    top = 16 * TILE_HEIGHT * row
    gap = max(top - y, y - top - 16 * (TILE_HEIGHT - 1), 0)
    return int(np.sqrt(reach * reach - gap * gap))


def assign(
    planes: NDArray[np.int16], colours: NDArray[np.int32], places: NDArray[np.int32], about: Grid
) -> NDArray[np.int32]:
    """Return each pixel's nearest candidate int32[h w]; a tile without one considers all."""
    best = np.full((about.height, about.width), np.iinfo(np.int32).max, np.int32)
    number_bits = (1 << (about.clusters - 1).bit_length()) - 1
    pixels = planes.astype(np.int32)

    def offer(k: int, rows: slice, columns: slice) -> None:
        coefficient = -2 * colours[k] >> about.shift
        distance = np.tensordot(coefficient, pixels[:, rows, columns], axes=1)
        distance += np.sum(colours[k].astype(np.int64) ** 2) >> 1 + about.shift
        for axis, span in enumerate((columns, rows)):
            away = (16 * np.arange(span.start, span.stop) - places[k, axis]).astype(np.float32)
            term = np.minimum(about.weight * (away * away), np.float32(FAR)).astype(np.int32)
            distance += term[None, :] if axis == 0 else term[:, None]
        packed = distance.astype(np.int32) & ~number_bits | k
        best[rows, columns] = np.minimum(best[rows, columns], packed)

    for k, (x, y) in enumerate(places):
        for row in range(*tiles(y, about.height, TILE_HEIGHT, about.reach)):
            reach = reach_in_row(y, row, about.reach)
            left, right = tiles(x, about.width, TILE_WIDTH, reach)
            rows = slice(row * TILE_HEIGHT, min((row + 1) * TILE_HEIGHT, about.height))
            columns = slice(left * TILE_WIDTH, min(right * TILE_WIDTH, about.width))
            offer(k, rows, columns)
    untouched = best[::TILE_HEIGHT, ::TILE_WIDTH] == np.iinfo(np.int32).max
    for row, column in np.argwhere(untouched) * (TILE_HEIGHT, TILE_WIDTH):
        rows = slice(row, min(row + TILE_HEIGHT, about.height))
        columns = slice(column, min(column + TILE_WIDTH, about.width))
        for k in range(about.clusters):
            offer(k, rows, columns)
    return best & number_bits


def update(
    planes: NDArray[np.int16],
    labels: NDArray[np.int32],
    colours: NDArray[np.int32],
    places: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the means of the clusters' pixels, rounded; a cluster without any stays."""
    count = np.bincount(labels.ravel(), minlength=len(colours))
    some = count > 0
    y, x = np.indices(labels.shape)
    colours, places = colours.copy(), places.copy()
    for target, values, unit in ((colours, planes, 2), (places, (x, y), 16)):
        for column, value in enumerate(values):
            # float64 holds these integer sums exactly
            total = np.bincount(labels.ravel(), value.ravel(), len(colours)).astype(np.int64)
            target[some, column] = (2 * unit * total[some] + count[some]) // (2 * count[some])
    return colours, places


# connected segments


def connect(clusters: NDArray[np.int32], asked: int) -> NDArray[np.int32]:
    """Return labels 0..k-1 int32[h w]: 4-connected, none under a quarter of the mean size asked.

    k is within max(5 %, 1) of `asked`: beyond that the smallest are merged or the largest cut.
    """
    labels, first = components(clusters)
    parent = merge(np.bincount(labels.ravel()), neighbours(labels, first), asked)
    kept, segments = np.unique(parent[labels], return_inverse=True)
    result = segments.reshape(clusters.shape).astype(np.int32)
    cut(result, len(kept), asked)
    return result


def tolerance(asked: int) -> int:
    """Return by how many the number of segments may differ from the number asked."""
    return max(1, asked // 20)


def components(clusters: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the 4-connected components int64[h w], numbered by their first pixels, and those."""
    index = np.arange(clusters.size).reshape(clusters.shape)
    right, down = clusters[:, 1:] == clusters[:, :-1], clusters[1:] == clusters[:-1]
    start = np.concatenate([index[:, 1:][right], index[1:][down]])
    end = np.concatenate([index[:, :-1][right], index[:-1][down]])
    edges = coo_matrix((np.ones(len(start)), (start, end)), shape=(clusters.size,) * 2)
    found = connected_components(edges, directed=False)[1]
    _, first, labels = np.unique(found, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.argsort(order)[labels].reshape(clusters.shape), first[order]


def neighbours(labels: Array, first: Array) -> NDArray[np.int64]:
    """Return the component left of (in the first column: above) each one's first pixel.

    Its number is always lower. Component 0 has none and gets itself.
    """
    width = labels.shape[1]
    before = np.where(first % width > 0, first - 1, first - width)
    return np.where(np.arange(len(first)) > 0, labels.ravel()[before], 0)


def merge(sizes: Array, before: Array, asked: int) -> NDArray[np.int64]:
    """Return for each component the one that it becomes part of, or itself.

    A small one joins the component before it; so do the smallest ones if there are too many.
    """
    small = 4 * asked * sizes < sizes.sum()
    kept = ~small
    kept[0] = True
    parent = _resolve(kept, before)
    if 4 * asked * np.bincount(parent, sizes)[0] < sizes.sum():
        kept[np.flatnonzero(kept)[1:2]] = False  # joins 0, which no other separates from it
    parent = _resolve(kept, before)
    roots = np.flatnonzero(kept)
    excess = len(roots) - asked - tolerance(asked)
    if excess > 0:
        joined = np.bincount(parent, sizes)[roots[1:]]
        kept[roots[1:][np.argsort(joined, kind="stable")[:excess]]] = False
    return _resolve(kept, before)


def _resolve(kept: Array, before: Array) -> NDArray[np.int64]:
    parent = np.arange(len(kept))
    for k in np.flatnonzero(~kept):
        parent[k] = parent[before[k]]
    return parent


def cut(labels: NDArray[np.int32], count: int, asked: int) -> int:
    """Cut the largest of `count` segments in two, in place, until about `asked`; return how many.

    The cut edge of its breadth-first tree leaves the most equal parts: both are connected and, as
    no pixel has more than four neighbours, neither is under a quarter. `cpu.py` compiles this.
    """
    while count < asked - max(1, asked // 20):
        sizes = np.bincount(labels.ravel())
        largest = int(np.argmax(sizes))
        pixels, parent = tree(labels, largest, sizes[largest])
        below = np.ones(len(pixels), np.int64)
        for step in range(len(pixels) - 1, 0, -1):
            below[parent[step]] += below[step]
        edge = 1 + int(np.argmin(np.abs(2 * below[1:] - len(pixels))))
        moved = np.zeros(len(pixels), np.bool_)
        moved[edge] = True
        for step in range(edge + 1, len(pixels)):
            moved[step] = moved[parent[step]]
        for step in range(edge, len(pixels)):
            if moved[step]:
                labels[pixels[step] // labels.shape[1], pixels[step] % labels.shape[1]] = count
        count += 1
    return count


@register_jitable  # so that `cut` can call it when compiled
def tree(
    labels: NDArray[np.int32], segment: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a segment's pixels in breadth-first order int64[size], and where their parents are."""
    height, width = labels.shape
    pixels, parent = np.zeros(size, np.int64), np.zeros(size, np.int64)
    seen = np.zeros(labels.size, np.bool_)
    pixels[0] = np.argmax(labels.ravel() == segment)
    seen[pixels[0]] = True
    end = 1
    for step in range(size):
        y, x = pixels[step] // width, pixels[step] % width
        for down, right in ((-1, 0), (0, -1), (0, 1), (1, 0)):
            v, u = y + down, x + right
            if 0 <= v < height and 0 <= u < width and labels[v, u] == segment:
                if not seen[v * width + u]:
                    seen[v * width + u] = True
                    pixels[end], parent[end] = v * width + u, step
                    end += 1
    return pixels, parent
