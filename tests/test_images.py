import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from dop_fast import images
from dop_fast.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from dop_fast.errors import ConfigError, DataError


def opened(
    path: Path | str, size: int = 32, seed: int = 0, share: float = 0.2
) -> tuple[images.ImageSet, images.ImageSet]:
    return images.open_images(DataConfig(str(path), size, share), Path("/nowhere"), seed)


@pytest.mark.parametrize("size", [8, 17, 32, 40, 64, 101])
def test_loaded_pixels_are_torchvisions_resize_and_centre_crop(
    tiny_images: Path, size: int
) -> None:
    train, _ = opened(tiny_images, size)
    peer = Compose([Resize(size), CenterCrop(size)])
    index = [30, 0, 7, 0]
    expected = [
        peer(Image.open(tiny_images / "train" / train.names[i]).convert("RGB")) for i in index
    ]
    assert np.array_equal(train.load(index), np.stack([np.asarray(image) for image in expected]))


@pytest.mark.parametrize("shape", [(40, 90), (91, 40), (33, 32), (32, 33)])
def test_portraits_and_panoramas_are_cropped_as_torchvision_does(
    tiny_copy: Path, shape: tuple[int, int]
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tiny_copy / "train" / "blue" / "00.png")
    expected = Compose([Resize(32), CenterCrop(32)])(Image.fromarray(noise))
    assert np.array_equal(opened(tiny_copy)[0].load([0])[0], np.asarray(expected))


def test_threads_change_no_pixel(tiny_images: Path) -> None:
    train, _ = opened(tiny_images, 96)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = train.load(range(len(train)))
        torch.set_num_threads(5)
        assert np.array_equal(train.load(range(len(train))), serial)
        assert train.load([]).shape == (0, 96, 96, 3)
    finally:
        torch.set_num_threads(threads)


def test_a_large_jpeg_decoded_in_part_looks_like_the_whole(tiny_copy: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    path = tiny_copy / "train" / "blue" / "00.jpg"
    coarse.resize((800, 600), Image.Resampling.BICUBIC).save(path, quality=95)
    train, _ = opened(tiny_copy, 64)
    found = train.load([train.names.index("blue/00.jpg")])[0]
    whole = Compose([Resize(64), CenterCrop(64)])(Image.open(path))
    # found 0.4 grey levels; half the margin would give 1.8, no antialiasing 3.8
    assert np.abs(found.astype(float) - np.asarray(whole)).mean() < 1
    assert train.decode(train.names.index("blue/00.jpg")).size == (800, 600)


def test_an_unreadable_image_is_named_when_it_is_loaded(tiny_copy: Path) -> None:
    path = tiny_copy / "train" / "green" / "03.png"
    path.write_bytes(path.read_bytes()[:500])
    train, _ = opened(tiny_copy)
    train.load([0])
    for read in (lambda row: train.load([row]), train.decode):
        with pytest.raises(DataError, match=r"green/03\.png") as caught:
            read(train.names.index("green/03.png"))
        assert caught.value.hint == "remove or replace it"


def test_a_file_that_vanished_is_named(tiny_copy: Path) -> None:
    train, _ = opened(tiny_copy)
    (tiny_copy / "train" / "blue" / "00.png").unlink()
    with pytest.raises(DataError, match=r"blue/00\.png"):
        train.load([0])


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "tif", "ppm"])
@pytest.mark.filterwarnings("ignore")  # PIL warns of some of the damage
def test_damaged_files_raise_nothing_but_data_errors(tiny_copy: Path, ending: str) -> None:
    rng = random.Random(0)
    train, _ = opened(tiny_copy)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tiny_copy / "train" / "blue" / "00.png"  # PIL looks at the content, not at the name
    whole = tiny_copy / f"whole.{ending}"
    train.decode(0).save(whole, **({"exif": exif} if ending in ("jpg", "png", "webp") else {}))
    failed = 0
    for _ in range(150):
        content = bytearray(whole.read_bytes())
        if rng.random() < 0.3:
            content = content[: rng.randrange(len(content))]
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(min(len(content), 200))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            assert train.load([0]).shape == (1, 32, 32, 3)
        except DataError:
            failed += 1
    assert failed > 10


def test_absurdly_large_images_are_refused(
    tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = opened(tiny_images)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 48 // 2 - 1)
    with pytest.raises(DataError, match=r"blue/00\.png.*exceeds limit"):
        train.load([0])


def test_absurdly_narrow_images_are_refused(tiny_copy: Path) -> None:
    Image.new("RGB", (3000, 2)).save(tiny_copy / "train" / "blue" / "00.png")
    with pytest.raises(DataError, match="narrow"):
        opened(tiny_copy)[0].load([0])


GREY, RED = (90, 90, 90), (200, 30, 40)
MODES = {
    "RGBA": (Image.new("RGBA", (9, 9), (*RED, 100)), "png", RED),
    "LA": (Image.new("LA", (9, 9), (90, 100)), "png", GREY),
    "L": (Image.new("L", (9, 9), 90), "png", GREY),
    "1": (Image.new("1", (9, 9), 1), "png", (255, 255, 255)),
    "P": (Image.new("RGB", (9, 9), RED).convert("P", palette=Image.Palette.ADAPTIVE), "png", RED),
    "I;16": (Image.fromarray(np.full((9, 9), 90 * 257, np.uint16)), "png", GREY),
    "I": (Image.fromarray(np.full((9, 9), 90 * 257, np.int32)), "tif", GREY),
    "CMYK": (Image.new("CMYK", (9, 9), (55, 225, 215, 0)), "tif", RED),
    "YCbCr": (Image.new("RGB", (9, 9), GREY).convert("YCbCr"), "tif", GREY),
}


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_become_rgb(tiny_copy: Path, mode: str) -> None:
    image, ending, expected = MODES[mode]
    assert image.mode == mode
    image.save(tiny_copy / "train" / "blue" / f"00.{ending}")
    train, _ = opened(tiny_copy)
    row = train.names.index(f"blue/00.{ending}")
    assert train.decode(row).mode == "RGB"
    assert (train.load([row]) == np.array(expected)).all()


def test_a_palette_with_transparency_becomes_rgb(tiny_copy: Path) -> None:
    image = Image.new("RGB", (9, 9), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tiny_copy / "train" / "blue" / "00.png", transparency=bytes([0] * 256))
    assert (opened(tiny_copy)[0].load([0]) == np.array(RED)).all()


def test_a_float_image_is_refused(tiny_copy: Path) -> None:
    Image.new("F", (9, 9), 0.5).save(tiny_copy / "train" / "blue" / "00.tif")
    train, _ = opened(tiny_copy)
    with pytest.raises(DataError, match="floats of an unknown range"):
        train.load([train.names.index("blue/00.tif")])


UNTURNED = [
    None,
    "FLIP_LEFT_RIGHT",
    "ROTATE_180",
    "FLIP_TOP_BOTTOM",
    "TRANSPOSE",
    "ROTATE_90",
    "TRANSVERSE",
    "ROTATE_270",
]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tiny_copy: Path, orientation: int) -> None:
    upright = Image.open(tiny_copy / "train" / "blue" / "01.png").copy()
    turn = UNTURNED[orientation - 1]  # how the camera stored it, by the EXIF standard
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tiny_copy / "train" / "blue" / "00.png", exif=exif)
    train, _ = opened(tiny_copy)
    assert np.array_equal(np.asarray(train.decode(0)), np.asarray(upright))
    assert np.array_equal(train.load([0]), train.load([1]))


def test_normalising_agrees_with_float64() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    found = images.normalise(torch.from_numpy(pixels), IMAGENET_MEAN, IMAGENET_STD)
    expected = ((pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    # sums of magnitude 3 in float32, rounded three times
    assert np.abs(found.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize(
    "statistics", [{"mean": (0.5,)}, {"std": (0.5, 0.5)}, {"std": (0.2, 0.0, 0.2)}]
)
def test_statistics_need_three_colours(
    tiny_images: Path, statistics: dict[str, tuple[float, ...]]
) -> None:
    with pytest.raises(ConfigError, match="mean and std"):
        images.open_images(DataConfig(str(tiny_images), **statistics), tiny_images, 0)
