"""Segments as a network sees them: Numba and Triton against Pillow."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dop_fast.kernels.compose import Entry, compose, reference
from dop_fast.types import Array, Segments

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # a normalised pixel is the pixel
FILL, SINGLE = 117, torch.float32
Compose = Callable[[Array, Segments, Array, Entry], Array]


def by_cpu(sources: Array, segments: Segments, index: Array, entry: Entry) -> Array:
    return by_both(sources, segments, index, entry).permute(0, 2, 3, 1).numpy()


def by_both(
    sources: Array, segments: Segments, index: Array, entry: Entry, dtype: torch.dtype = SINGLE
) -> Tensor:
    """Return what the public function does, into a buffer with room to spare."""
    out = torch.full((len(index) + 2, entry.size, entry.size, 3), 7, dtype=dtype)
    found = compose(torch.from_numpy(sources), segments, index, entry, out)
    assert (out[len(index) :] == 7).all()
    return found


def by_gpu(sources: Array, segments: Segments, index: Array, entry: Entry) -> Array:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (torch.cuda.is_available() or interpreted):
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    from dop_fast.kernels.compose import gpu

    device = "cpu" if interpreted else "cuda"
    out = torch.empty((len(index), entry.size, entry.size, 3), device=device)
    gpu.compose(torch.from_numpy(sources).to(device), segments.select(index), entry, out)
    return out.cpu().numpy()


twins = pytest.mark.parametrize("twin", [by_cpu, by_gpu], ids=["cpu", "gpu"])


def pack(masks: list[tuple[int, int, Array]], canvas: tuple[int, int]) -> Segments:
    """Return segments of (top, left, mask inside the box), each of its own image."""
    boxes = [(top, left, top + len(m), left + m.shape[1]) for top, left, m in masks]
    bits = [np.packbits(mask) for _, _, mask in masks]
    return Segments(
        np.arange(len(masks), dtype=np.int32),
        np.array(boxes, np.int32),
        np.full(len(masks), 15, np.int16),
        np.cumsum([0, *map(len, bits)], dtype=np.int64),
        np.concatenate(bits),
        canvas,
    )


def made(canvas: tuple[int, int], seed: int = 0) -> tuple[Array, Segments]:
    """Return noise images and, in each, a segment of another kind."""
    rng = np.random.default_rng(seed)
    height, width = canvas
    ragged = rng.random((height - 2, width - 3)) < 0.7
    masks = [
        (1, 2, ragged),
        (height // 2, width // 3, np.ones((1, 1), bool)),
        (0, width - 1, rng.random((height, 1)) < 0.5),
        (height - 1, 0, np.ones((1, width), bool)),
        (0, 0, np.ones(canvas, bool)),
        (2, 1, np.eye(min(canvas) - 2, dtype=bool)),
        (0, 0, ragged[:4, :3]),
    ]
    sources = rng.integers(0, 256, (len(masks), *canvas, 3), dtype=np.uint8)
    sources[5] = 200  # a constant image
    return sources, pack(masks, canvas)


@twins
@pytest.mark.parametrize(
    ("canvas", "size"), [((9, 11), 12), ((12, 12), 12), ((20, 14), 12), ((9, 16), 7)], ids=str
)
def test_pixels_are_pillows(twin: Compose, canvas: tuple[int, int], size: int) -> None:
    sources, segments = made(canvas)
    entry = Entry(size, FILL, **PLAIN)
    index = np.array([6, 0, 1, 2, 3, 4, 5, 0])
    expected = reference.stretch(sources, segments, index, entry)
    assert np.allclose(twin(sources, segments, index, entry), expected, rtol=0, atol=1e-4)


def test_photograph_size_segments_are_pillows() -> None:
    sources, segments = made((224, 200))
    entry = Entry(224, FILL, **PLAIN)
    index = np.arange(len(segments))
    expected = reference.stretch(sources, segments, index, entry)
    assert np.allclose(by_cpu(sources, segments, index, entry), expected, rtol=0, atol=1e-4)


def test_the_reference_is_the_crop_by_hand() -> None:
    sources, segments = made((9, 11))
    whole = np.zeros((9, 11), bool)
    whole[1:8, 2:10] = segments.mask(0)
    grey = np.where(whole[..., None], sources[0], FILL).astype(np.uint8)
    small = Image.fromarray(grey[1:8, 2:10]).resize((12, 12), Image.Resampling.BICUBIC)
    entry = Entry(12, FILL, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = (np.asarray(small) / 255 - entry.mean) / entry.std
    found = reference.compose(sources, segments, np.array([0]), entry)
    assert np.allclose(found[0], expected, atol=1e-6)


@twins
def test_colours_are_normalised_as_the_reference_does(twin: Compose) -> None:
    sources, segments = made((9, 11))
    entry = Entry(10, FILL, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    index = np.arange(4)
    expected = reference.compose(sources, segments, index, entry)
    assert np.allclose(twin(sources, segments, index, entry), expected, atol=1e-5)


@twins
def test_what_lies_outside_the_segment_does_not_matter(twin: Compose) -> None:
    sources, segments = made((9, 11))
    entry, index = Entry(10, FILL, **PLAIN), np.array([0, 2, 5])
    before = twin(sources, segments, index, entry)
    changed = np.full_like(sources, 3)
    for i in index:
        top, left, bottom, right = segments.box[i]
        inside = segments.mask(i)
        changed[i, top:bottom, left:right][inside] = sources[i, top:bottom, left:right][inside]
    assert np.array_equal(before, twin(changed, segments, index, entry))


def test_bfloat16_is_the_rounded_float32() -> None:
    sources, segments = made((20, 30))
    entry, index = Entry(16, FILL, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)), np.arange(len(segments))
    single = by_both(sources, segments, index, entry)
    half = by_both(sources, segments, index, entry, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, single.bfloat16())
    assert single.shape == (len(segments), 3, 16, 16)
    assert single.is_contiguous(memory_format=torch.channels_last)


def test_the_number_of_threads_changes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, segments = made((24, 31))
    index, entry = np.arange(len(segments)), Entry(32, FILL, **PLAIN)
    alone = by_cpu(sources, segments, index, entry)
    for threads in (2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert np.array_equal(by_cpu(sources, segments, index, entry), alone)


def test_no_segments_make_an_empty_batch() -> None:
    sources, segments = made((20, 30))
    entry = Entry(16, FILL, **PLAIN)
    assert len(by_both(sources, segments, np.empty(0, int), entry)) == 0


def test_segments_that_do_not_fit_are_refused() -> None:
    sources, segments = made((20, 30))
    entry, index = Entry(16, FILL, **PLAIN), np.arange(len(segments))
    with pytest.raises(ValueError, match="sources"):
        by_both(sources[:, :10], segments, index, entry)
    with pytest.raises(ValueError, match="do not fit"):
        by_both(sources[:3], segments, index, entry)
    with pytest.raises(ValueError, match="float64"):
        by_both(sources, segments, index, entry, torch.float64)
    with pytest.raises(ValueError, match="7 segments"):
        compose(torch.from_numpy(sources), segments, index, entry, torch.empty(3, 16, 16, 3))
