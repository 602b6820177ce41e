"""Bad settings, stores, masks, weights and runs: told by name with the next step."""

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from safetensors.numpy import load_file, save_file
from small_space import Run, contents

Damage = Callable[[Path], object]
MASK = "snip-stitched-0.9-s0"
MASK_FILE, RUN = Path(f"masks/{MASK}.safetensors"), Path(f"runs/{MASK}")


def toml(old: str, new: str) -> Damage:
    """Change one line of dopfast.toml."""

    def damage(root: Path) -> None:
        text = (root / "dopfast.toml").read_text()
        assert old in text
        (root / "dopfast.toml").write_text(text.replace(old, new, 1))

    return damage


def write(name: str | Path, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(data)


def folder(name: str | Path) -> Damage:
    """Put a folder where a file should be."""
    return lambda root: ((root / name).unlink(missing_ok=True), (root / name).mkdir(parents=True))


def nothing(root: Path) -> None:
    """Leave all as it is: what is bad is asked for."""


def mask(change: Callable[[dict[str, Any], dict[str, str]], object]) -> Damage:
    """Change the tensors or the metadata of the mask."""

    def damage(root: Path) -> None:
        tensors = dict(load_file(root / MASK_FILE))
        data = (root / MASK_FILE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        about = json.loads(data[8 : 8 + length])["__metadata__"]
        del about["crc32c"]  # as a file of others, whose content is looked at
        change(tensors, about)
        save_file(tensors, root / MASK_FILE, about)

    return damage


def attribute(**changes: object) -> Damage:
    return lambda root: zarr.open_group(root / "patches.zarr").attrs.update(changes)


def remove(pattern: str) -> Damage:
    def damage(root: Path) -> None:
        found = [path for path in root.glob(pattern) if path.is_file()]
        assert found
        found[0].unlink()

    return damage


def flip(pattern: str) -> Damage:
    def damage(root: Path) -> None:
        path = next(path for path in root.glob(pattern) if path.is_file())
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)

    return damage


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(root: Path) -> None:
        content = json.loads((root / RUN / "manifest.json").read_text())
        change(content)
        (root / RUN / "manifest.json").write_text(json.dumps(content))

    return damage


class Evil:
    """A pickle that would leave a trace."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("/tmp/dopfast-ran-a-pickle"),)


def weights(name: str, save: Callable[[Path], object]) -> Damage:
    def damage(root: Path) -> None:
        save(root / name)
        toml('[teacher]\nname = "net:small"', f'[teacher]\nname = "net:small"\nweights = "{name}"')(
            root
        )

    return damage


def lying_header(path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


def more_classes(root: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(root / "data" / part / "red", root / "data" / part / "white")


STITCH, EXTRACT = "stitch --force", "extract --force"
PRUNE, TUNE = "prune --name mine", f"finetune --mask {MASK}"
SETTINGS: dict[str, tuple[Damage, str, str]] = {
    "TOML with a text for a number": (toml("sigma = 0.5", 'sigma = "0.5"'), STITCH, "sigma"),
    "TOML with a number for a text": (toml('path = "data"', "path = 3"), PRUNE, "path"),
    "TOML with a list for a number": (toml("size = 32", "size = [32]"), PRUNE, "size"),
    "TOML with numbers that are none": (
        toml("n_segments = [6, 12]", 'n_segments = ["6"]'), EXTRACT, "n_segments",
    ),
    "TOML with true for a count": (toml("per_class = 2", "per_class = true"), STITCH, "per_class"),
    "TOML with a date": (toml("seed = 0", "seed = 2020-01-01"), STITCH, "seed"),
    "TOML with nan": (toml("sigma = 0.5", "sigma = nan"), STITCH, "sigma"),
    "TOML with an unknown key": (toml("sigma =", "sigmaa ="), STITCH, "sigmaa"),
    "TOML with an unknown table": (toml("[stitch]", "[stich]"), STITCH, "stich"),
    "TOML with a table for a key": (toml("seed = 0", "[seed]\na = 1"), STITCH, "seed"),
    "TOML with a key twice": (toml("seed = 0", "seed = 0\nseed = 1"), STITCH, "dopfast.toml"),
    "TOML cut off": (toml("sigma = 0.5", "sigma ="), STITCH, "dopfast.toml"),
    "TOML of other bytes": (write("dopfast.toml", b"\xff\xfe\0"), STITCH, "dopfast.toml"),
    "TOML of a deep nest": (write("dopfast.toml", "a=" + "[" * 5000), STITCH, "dopfast.toml"),
    "TOML that is a folder": (folder("dopfast.toml"), STITCH, "dopfast.toml"),
    "TOML with a huge number": (toml("seed = 0", f"seed = {'9' * 5000}"), STITCH, "dopfast.toml"),
    "store of a number": (toml("seed = 0", "seed = 0\nstore = 1"), STITCH, "store"),
    "store at an unknown protocol": (
        toml("seed = 0", 'seed = 0\nstore = "nowhere://x"'), STITCH, "nowhere://x",
    ),
    "sigma of 0": (nothing, f"{STITCH} --sigma 0", "sigma must lie in (0, 1)"),
    "sigma of 1": (nothing, f"{STITCH} --sigma 1", "sigma must lie in (0, 1)"),
    "sigma of nan": (nothing, f"{STITCH} --sigma nan", "sigma must lie in (0, 1)"),
    "sigma of text": (nothing, f"{STITCH} --sigma x", "sigma"),
    "sparsity of 1": (nothing, f"{PRUNE} --sparsity 1", "sparsity must lie in [0, 1)"),
    "sparsity of 1.5": (nothing, f"{PRUNE} --sparsity 1.5", "sparsity must lie in [0, 1)"),
    "sparsity of nan": (nothing, f"{PRUNE} --sparsity nan", "sparsity must lie in [0, 1)"),
    "no epochs": (nothing, "finetune --epochs 0", "epochs"),
    "an infinite rate": (nothing, "finetune --lr inf", "lr"),
    "a device that is not there": (nothing, "extract --force --device cuda:99", "cuda:99"),
    "a device of no kind": (nothing, "extract --force --device toaster", "toaster"),
    "an unknown criterion": (nothing, "prune --criterion grap", "grap"),
    "a name that leaves its folder": (nothing, "prune --name ../../mine", "../../mine"),
    "a run that leaves its folder": (nothing, "finetune --dense --name ../../mine", "../../mine"),
    "a mask that is not there": (nothing, "finetune --mask gone", "gone"),
    "a mask of no workspace": (nothing, "finetune --mask ../../x", "../../x"),
    "a class that is not there": (nothing, "show concepts --class gone", "gone"),
    "an image that is not there": (nothing, "show segments --image 999", "999"),
    "an image before the first": (nothing, "show segments --image -1", "-1"),
    "a sweep that is not there": (nothing, "sweep gone.toml", "gone.toml"),
}  # fmt: skip
CONTENT: dict[str, tuple[Damage, str, str]] = {
    "a store of another version": (attribute(version=99), STITCH, "version 99"),
    "a store of something else": (attribute(schema="other"), STITCH, "other"),
    "a store that is unfinished": (attribute(finished=False), STITCH, "unfinished"),
    "a store without a header": (attribute(header=3), STITCH, "patches.zarr"),
    "a store with a header that lies": (
        attribute(header={"classes": 3, "canvas": "x"}), STITCH, "patches.zarr",
    ),
    "a store that is a file": (
        lambda root: (shutil.rmtree(root / "patches.zarr"), write("patches.zarr", "x")(root)),
        STITCH, "patches.zarr",
    ),
    "a store that is empty": (
        lambda root: (shutil.rmtree(root / "patches.zarr"), (root / "patches.zarr").mkdir()),
        STITCH, "patches.zarr",
    ),
    "a store whose metadata are cut": (
        write("patches.zarr/zarr.json", '{"zarr_format": 3'), STITCH, "patches.zarr",
    ),
    "a store without a class": (
        lambda root: shutil.rmtree(root / "patches.zarr/classes/1"), STITCH, "classes/1",
    ),
    "a store that lacks a chunk": (remove("patches.zarr/classes/1/bits/c/*"), STITCH, "bits"),
    "a store that lacks zeros": (remove("patches.zarr/classes/1/offset/c/*"), STITCH, "offset"),
    "a store with a flipped chunk": (flip("patches.zarr/classes/1/bits/c/*"), STITCH, "classes/1"),
    "a store whose column is no array": (
        write("patches.zarr/classes/1/box/zarr.json", "[]"), STITCH, "classes/1",
    ),
    "patches with a flipped byte": (flip("patches.zarr/stitched/pixels/c/**/*"), PRUNE, "stitched"),
    "patches that lack a file": (remove("patches.zarr/stitched/pixels/c/**/*"), PRUNE, "pixels"),
    "patches that lack an array": (
        lambda root: shutil.rmtree(root / "patches.zarr/stitched/label"), PRUNE, "stitched",
    ),
    "an empty mask": (write(MASK_FILE, b""), TUNE, MASK),
    "a mask of text": (write(MASK_FILE, "mask " * 99), TUNE, MASK),
    "a mask that is a folder": (folder(MASK_FILE), TUNE, MASK),
    "a mask with a header that lies": (lambda root: lying_header(root / MASK_FILE), TUNE, MASK),
    "a mask of floats with NaN": (
        mask(lambda t, _: t.update({"0.weight": t["0.weight"] * float("nan")})), TUNE, "0.weight",
    ),
    "a mask of 16 bits": (
        mask(lambda t, _: t.update({"0.weight": t["0.weight"].astype("u2")})), TUNE, "0.weight",
    ),
    "a mask too short": (
        mask(lambda t, _: t.update({"0.weight": t["0.weight"][:3]})), TUNE, "0.weight",
    ),
    "a mask with a layer too many": (
        mask(lambda t, _: t.update({"more": t["0.weight"]})), TUNE, MASK,
    ),
    "a mask with other names": (
        mask(lambda t, a: (t.update({"x": t.pop("0.weight")}),
                           a.update(layers=a["layers"].replace("0.weight", "x")))), TUNE, "x",
    ),
    "a mask with other counts": (
        mask(lambda _, a: a.update(layers=re.sub(r'"kept": \d+', '"kept": 1', a["layers"]))),
        TUNE, MASK,
    ),
    "a mask without metadata": (mask(lambda _, a: a.clear()), TUNE, MASK),
    "a mask of another version": (mask(lambda _, a: a.update(version="9")), TUNE, "version 9"),
    "a mask that does not say of what": (mask(lambda _, a: a.update(about="{}")), TUNE, MASK),
    "a mask with a flipped byte": (flip(str(MASK_FILE)), TUNE, MASK),
    "weights that run code": (
        weights("evil.pth", lambda path: path.write_bytes(pickle.dumps(Evil(), 2))), EXTRACT,
        "evil.pth",
    ),
    "weights of a whole model": (
        weights("net.pt", lambda path: torch.save(torch.nn.Linear(2, 2), path)), EXTRACT, "net.pt",
    ),
    "weights of text": (weights("w.pth", lambda path: path.write_text("x")), EXTRACT, "w.pth"),
    "weights with a header that lies": (weights("w.safetensors", lying_header), EXTRACT, "w.safe"),
    "weights that are cut": (
        weights("w.safetensors", lambda path: path.write_bytes(
            (path.parent / "teacher.safetensors").read_bytes()[:-9])), EXTRACT, "w.safe",
    ),
    "weights of no known kind": (weights("w.bin", lambda path: path.touch()), EXTRACT, "w.bin"),
    "weights that are a folder": (weights("w.pth", lambda path: path.mkdir()), EXTRACT, "w.pth"),
    "weights of NaN": (
        weights("w.safetensors", lambda path: save_file(
            {k: v * float("nan")
             for k, v in load_file(path.parent / "teacher.safetensors").items()}, path)),
        EXTRACT, "NaN",
    ),
    "more classes than the teacher has": (more_classes, EXTRACT, "net:small"),
    "a network that is not there": (toml("net:small", "net:gone"), EXTRACT, "gone"),
    "a network with a mistake": (
        lambda root: (write("bad1.py", "import nothing_at_all")(root),
                      toml("net:small", "bad1:small")(root)), EXTRACT, "nothing_at_all",
    ),
    "a network that is no Python": (
        lambda root: (write("bad2.py", "def (")(root), toml("net:small", "bad2:small")(root)),
        EXTRACT, "bad2",
    ),
    "a manifest that is cut": (write(RUN / "manifest.json", '{"a": '), TUNE, "manifest.json"),
    "a manifest of a list": (write(RUN / "manifest.json", "[]"), TUNE, "manifest.json"),
    "a manifest without settings": (manifest(lambda c: c.pop("settings")), TUNE, "manifest.json"),
    "a manifest of another version": (manifest(lambda c: c.update(version=9)), TUNE, "manifest"),
    "a checkpoint of text": (write(RUN / "checkpoint.safetensors", "x"), TUNE, "checkpoint"),
    "metrics that are cut": (write(RUN / "metrics.jsonl", '{"epoch": 1'), "report", "metrics"),
    "a sweep of wrong types": (write("s.toml", "criteria = 3"), "sweep s.toml", "criteria"),
    "a sweep that is cut": (write("s.toml", "criteria = ["), "sweep s.toml", "s.toml"),
    "a sweep with an unknown key": (write("s.toml", "criterias = []"), "sweep s.toml", "criterias"),
}  # fmt: skip
CASES = {**SETTINGS, **CONTENT}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_told_with_the_next_step_and_harms_nothing(
    space: Path, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    damage, command, message = CASES[name]
    damage(space)
    before = contents(space)
    monkeypatch.chdir(space)
    told = run(*command.split())
    assert told.code in (1, 2), told
    assert message in told.err, told
    assert re.search(r"\nhint: \S", told.err), told
    after = contents(space)
    assert {path: after.get(path) for path in before} == before
    assert not Path("/tmp/dopfast-ran-a-pickle").exists()


def test_there_are_more_than_sixty_of_them() -> None:
    assert len(CASES) > 60
