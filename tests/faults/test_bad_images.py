"""Bad images, folders and zips: told by name with the next step, and nothing is harmed."""

import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_space import Run, contents

Damage = Callable[[Path], object]
FIRST = Path("data/train/blue/00.png")
SHOW = ("show", "segments", "--class", "blue")


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """Return a PNG that declares a size, whatever its body holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + data


def content(data: bytes) -> Damage:
    return lambda root: (root / FIRST).write_bytes(data)


def picture(image: Image.Image, kind: str, **options: object) -> Damage:
    return lambda root: image.save(root / FIRST, kind, **options)


def cut(kind: str, share: float) -> Damage:
    def damage(root: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
        Image.fromarray(noise).save(root / FIRST, kind)
        whole = (root / FIRST).read_bytes()
        (root / FIRST).write_bytes(whole[: int(len(whole) * share)])

    return damage


def lying_jpeg(root: Path) -> None:
    """Say 60000 x 60000 in the header of a JPEG of 8 x 8."""
    Image.new("RGB", (8, 8)).save(root / FIRST, "JPEG")
    data = bytearray((root / FIRST).read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60000, 60000)
    (root / FIRST).write_bytes(data)


def sparse(root: Path) -> None:
    with (root / FIRST).open("wb") as file:
        file.truncate(1 << 40)


def unreadable(root: Path) -> None:
    """Put a file there that nobody may read, not even root: one in /proc."""
    (root / FIRST).unlink()
    (root / FIRST).symlink_to("/proc/self/mem")


def folder_for_file(root: Path) -> None:
    (root / FIRST).unlink()
    (root / FIRST).mkdir()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


NOISE = np.random.default_rng(1).integers(0, 255, (40, 48), np.uint8)
GREY, COLOUR = Image.fromarray(NOISE), Image.fromarray(np.dstack([NOISE] * 3))
REFUSED: dict[str, Damage] = {
    "empty": content(b""),
    "text": content(b"not an image at all"),
    "zeros": content(bytes(4096)),
    "script": content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    "html": content(b"<html><body>404 Not Found</body></html>"),
    "head of a PNG": content(b"\x89PNG\r\n\x1a\n"),
    "PNG of 0 x 0": content(png(0, 0)),
    "PNG that lies": content(png(48, 40, bytes(10))),
    "bomb of 60000 x 60000": content(png(60000, 60000, bytes(10))),
    "bomb of 12000 x 12000": content(png(12000, 12000, bytes(10))),
    "bomb that can be decoded": content(png(10001, 10001, bytes(10001 * 30004))),
    "lying JPEG": lying_jpeg,
    "truncated JPEG": cut("JPEG", 0.5),
    "JPEG without its end": cut("JPEG", 0.95),
    "truncated PNG": cut("PNG", 0.4),
    "truncated WebP": cut("WEBP", 0.5),
    "truncated TIFF": cut("TIFF", 0.3),
    "truncated BMP": cut("BMP", 0.5),
    "floats": picture(Image.fromarray(np.full((40, 48), np.nan, np.float32)), "TIFF"),
    "too narrow": picture(Image.new("RGB", (3000, 2)), "PNG"),
    "a tebibyte": sparse,
    "unreadable": unreadable,
}
READ: dict[str, Damage] = {
    "1 x 1": picture(Image.new("RGB", (1, 1)), "PNG"),
    "16 bits": picture(Image.fromarray(NOISE.astype(np.uint16) * 257), "PNG"),
    "32 bits": picture(Image.fromarray(NOISE.astype(np.int32) * 257), "TIFF"),
    "CMYK": picture(COLOUR.convert("CMYK"), "JPEG"),
    "palette": picture(COLOUR.convert("P"), "PNG"),
    "transparent palette": picture(COLOUR.convert("P"), "PNG", transparency=bytes(256)),
    "animated GIF": picture(GREY, "GIF", save_all=True, append_images=[GREY, GREY]),
    "animated WebP": picture(COLOUR, "WEBP", save_all=True, append_images=[COLOUR]),
    "black and white": picture(GREY.convert("1"), "PNG"),
    "grey with alpha": picture(GREY.convert("LA"), "PNG"),
    "a GIF called PNG": picture(COLOUR, "GIF"),
    "a folder for a file": folder_for_file,
}


@pytest.mark.parametrize("damage", REFUSED.values(), ids=REFUSED)
def test_an_image_that_cannot_be_read_is_named(space: Path, run: Run, damage: Damage) -> None:
    damage(space)
    before = contents(space, without=FIRST)
    told = run(*SHOW, "-w", space)
    assert told.code == 1, told
    assert "cannot read the image blue/00.png" in told.err
    assert "hint: remove or replace it" in told.err
    assert contents(space, without=FIRST) == before


@pytest.mark.parametrize("damage", READ.values(), ids=READ)
def test_an_unusual_image_is_read_or_passed_over(space: Path, run: Run, damage: Damage) -> None:
    damage(space)
    told = run(*SHOW, "-w", space)
    assert told.code == 0, told
    with Image.open(space / "segments-blue.png") as sheet:
        assert sheet.width > 32


def test_an_extraction_that_meets_a_bad_image_keeps_the_store_that_is_there(
    space: Path, run: Run
) -> None:
    for path in (space / "data/train/green").iterdir():
        path.write_bytes(b"damaged")
    before = contents(space / "patches.zarr")
    told = run("extract", "--force", "-w", space)
    assert told.code == 1 and "cannot read the image green/" in told.err
    assert contents(space / "patches.zarr") == before


ODD_NAMES = (
    "é.png",
    "中文.png",
    "a\nb.png",
    "🙂.png",
    "-rf.png",
    "'\";.png",
    os.fsdecode(b"\xff.png"),
)


def test_odd_names_links_and_pipes_harm_no_command(space: Path, run: Run) -> None:
    blue = space / "data/train/blue"
    for name in ODD_NAMES:
        shutil.copy(space / FIRST, blue / name)
    (blue / "again").symlink_to(space / "data")
    (blue / "me.png").symlink_to(blue / "me.png")
    os.mkfifo(blue / "pipe.png")
    for part in ("train", "val"):
        (space / "data" / part / "red").rename(space / "data" / part / "r\ned <b>é中🙂'\"")
    (space / "patches.zarr").rename(space / "old.zarr")
    for command in ("extract", "stitch", "prune --name n", "show concepts", "report"):
        told = run(*command.split(), "-w", space)
        assert told.code == 0, (command, told)
    assert "<b>é" not in (space / "report.html").read_text()


def without(*classes: str) -> Damage:
    return lambda root: [
        shutil.rmtree(root / "data" / part / name) for part in ("train", "val") for name in classes
    ]  # fmt: skip


TREES: dict[str, tuple[Damage, str]] = {
    "no data": (lambda root: shutil.rmtree(root / "data"), "there are no images at data"),
    "a file of text": (
        lambda root: (shutil.rmtree(root / "data"), (root / "data").write_text("x")),
        "neither a folder nor a readable zip",
    ),
    "no classes": (without("red", "green", "blue"), "no folders of images"),
    "one class": (without("red", "green"), "only one class: blue"),
    "an empty class": (lambda root: empty(root / "data/train/green"), "class green has no images"),
    "a class that is only held out": (
        lambda root: shutil.rmtree(root / "data/train/red"), "classes differ",
    ),
    "a link to nowhere": (
        lambda root: (shutil.rmtree(root / "data"), (root / "data").symlink_to("/gone")),
        "there are no images at data",
    ),
    "a link to itself": (
        lambda root: (shutil.rmtree(root / "data"), (root / "data").symlink_to("data")),
        "data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_a_tree_that_cannot_be_used_is_told(space: Path, run: Run, name: str) -> None:
    damage, message = TREES[name]
    damage(space)
    before = contents(space)
    told = run("prune", "--criterion", "random", "--name", "mine", "-w", space)
    assert told.code in (1, 2), told
    assert message in told.err and "\nhint: " in told.err
    assert contents(space) == before


def member(name: str, data: bytes = b"x", **changes: object) -> Damage:
    """Add a member to the zip, its entry changed as asked."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            info = zipfile.ZipInfo(name)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.writestr(info, data)

    return damage


def encrypted(path: Path) -> None:
    """Set the flag that says so in every entry of the directory."""
    data = path.read_bytes()
    parts = data.split(b"PK\x01\x02")
    path.write_bytes(
        b"PK\x01\x02".join([parts[0], *(p[:4] + b"\x01\x00" + p[6:] for p in parts[1:])])
    )


def shortened(share: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


ZIPS: dict[str, tuple[Damage, str]] = {
    "climbs": (member("../../x.png"), "outside of itself: ../../x.png"),
    "climbs within": (member("train/blue/../../../x.png"), "outside of itself"),
    "absolute": (member("/etc/x.png"), "outside of itself: /etc/x.png"),
    "a drive": (member("C:\\x.png"), "outside of itself"),
    "encrypted": (encrypted, "encrypted"),
    "truncated": (shortened(0.6), "neither a folder nor a readable zip"),
    "cut at the end": (shortened(0.999), "neither a folder nor a readable zip"),
    "not a zip": (lambda path: path.write_bytes(b"PK\3\4 no"), "readable zip"),
    "empty": (lambda path: path.write_bytes(b""), "readable zip"),
    "rare compression": (member("train/blue/x.png", compress_type=zipfile.ZIP_LZMA), "rare"),
}


def zipped(space: Path) -> Path:
    path = space / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for image in sorted((space / "data").rglob("*.png")):
            archive.write(image, str(image.relative_to(space / "data")))
    text = (space / "dopfast.toml").read_text().replace('path = "data"', 'path = "data.zip"')
    (space / "dopfast.toml").write_text(text)
    return path


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_that_cannot_be_trusted_is_refused(space: Path, run: Run, name: str) -> None:
    damage, message = ZIPS[name]
    damage(zipped(space))
    before = contents(space.parent)
    told = run("prune", "--criterion", "random", "--name", "mine", "-w", space)
    assert told.code == 1, told
    assert message in told.err and "\nhint: " in told.err
    assert contents(space.parent) == before


def link(path: Path) -> None:
    member("train/blue/00.png", b"/etc/passwd", external_attr=0o120777 << 16)(path)


def inflated(path: Path) -> None:
    """Add an image that unpacks to 64 MiB, and says that it has 100 bytes."""
    member("train/blue/00.png", bytes(1 << 26), compress_type=zipfile.ZIP_DEFLATED)(path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 100)
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("damage", [link, inflated])
def test_a_member_that_is_no_image_is_named_and_nothing_is_unpacked(
    space: Path, run: Run, damage: Damage
) -> None:
    damage(zipped(space))
    told = run(*SHOW, "-w", space)
    assert told.code == 1, told
    assert "cannot read the image blue/00.png" in told.err
    assert "root:" not in told.err
