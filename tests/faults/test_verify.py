"""`dopfast verify` finds a flipped bit wherever there is a checksum, and `doctor` tells a tale."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_space import Run, begin

from dop_fast import doctor

COVERED = ("patches.zarr", "random.zarr", "masks", "runs", "teacher.safetensors")


def covered(space: Path) -> list[Path]:
    """Return the files that have a checksum, their own or inside of their group."""
    found = [path for name in COVERED for path in (space / name, *(space / name).rglob("*"))]
    jsons = ("metrics.jsonl", "manifest.json")
    return sorted(path for path in found if path.is_file() and path.name not in jsons)


def test_a_whole_workspace_is_sound(space: Path, run: Run) -> None:
    told = run("verify", "--json", "-w", space)
    assert told.code == 0, told
    found = json.loads(told.out)["found"]
    assert {one["state"] for one in found} == {"sound"}
    seen = {one["path"] for one in found}
    assert {"patches.zarr", "patches.zarr/classes/2", "patches.zarr/stitched", "random.zarr"} < seen
    assert {"masks/snip-stitched-0.9-s0.safetensors", "teacher.safetensors"} < seen


def test_a_new_workspace_has_nothing_to_read(tmp_path: Path, tiny_images: Path, run: Run) -> None:
    begin(tmp_path, tiny_images)
    assert run("verify", "-w", tmp_path).out == "there is nothing to read yet\n"


def test_a_flipped_bit_is_found_in_any_file_that_has_a_checksum(space: Path, run: Run) -> None:
    lot = random.Random(0)
    every = covered(space)
    paths = [path for path in every if path.suffix == ".safetensors"]
    paths += lot.sample([path for path in every if path not in paths], 14)
    assert len(paths) > 18
    for path in paths:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[lot.randrange(len(whole))] ^= 1 << lot.randrange(8)
        path.write_bytes(damaged)
        told = run("verify", "-w", space)
        assert told.code == 1, (path, told)
        assert "damaged" in told.err and "\nhint: " in told.err
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "name",
    ["patches.zarr/classes/1/bits/c/0", "patches.zarr/classes/1/bits/zarr.json",
     "patches.zarr/classes/1/zarr.json", "patches.zarr/classes/1", "patches.zarr/classes/zarr.json",
     "patches.zarr/classes", "patches.zarr/stitched/pixels", "patches.zarr/stitched/zarr.json"],
)  # fmt: skip
def test_what_is_missing_is_found(space: Path, run: Run, name: str) -> None:
    path = space / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    told = run("verify", "-w", space)
    assert told.code == 1 and "patches.zarr" in told.err


@pytest.mark.parametrize(
    "name", ["patches.zarr", "patches.zarr/classes/1", "patches.zarr/stitched", "random.zarr"]
)
def test_a_group_without_its_checksum_is_found(space: Path, run: Run, name: str) -> None:
    path = space / name / "zarr.json"
    content = json.loads(path.read_text())
    del content["attributes"]["crc32c"]
    path.write_text(json.dumps(content))
    told = run("verify", "-w", space)
    assert told.code == 1 and name in told.err


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.jsonl"])
def test_what_a_finished_run_lacks_is_found(space: Path, run: Run, name: str) -> None:
    (space / "runs/teacher" / name).unlink()
    told = run("verify", "-w", space)
    assert told.code == 1 and f"lacks {name}" in told.err and "dopfast train" in told.err


@pytest.mark.parametrize("folder", ["sanity/masks", "exports"])
def test_masks_elsewhere_are_read_too(space: Path, run: Run, folder: str) -> None:
    (space / folder).mkdir(parents=True)
    path = space / folder / "a.safetensors"
    shutil.copy(next((space / "masks").glob("*.safetensors")), path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    told = run("verify", "-w", space)
    assert told.code == 1 and f"{folder}/a.safetensors" in told.err


def test_the_stores_of_sweeps_are_read_too(space: Path, run: Run) -> None:
    store = shutil.copytree(space / "patches.zarr", space / "sweeps/stitched-0.zarr")
    shutil.rmtree(store / "classes/2")
    told = run("verify", "-w", space)
    assert told.code == 1 and "sweeps/stitched-0.zarr/classes/2" in told.err


def test_a_manifest_that_cannot_be_read_is_found(space: Path, run: Run) -> None:
    (space / "runs/teacher/manifest.json").write_text("{")
    told = run("verify", "-w", space)
    assert told.code == 1 and "runs/teacher" in told.err


def test_a_file_of_others_is_told_to_have_no_checksum(space: Path, run: Run) -> None:
    path = space / "teacher.safetensors"
    save_file(load_file(path), path, {"model": "net:small"})
    told = run("verify", "-w", space)
    assert told.code == 0 and "teacher.safetensors has no checksum" in told.err


def test_the_doctor_runs_every_kernel_beside_its_reference(run: Run) -> None:
    told = run("doctor", "--json")
    assert told.code == 0, told
    found = json.loads(told.out)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    kernels = {
        path.parent.name for path in Path(doctor.__file__).parent.glob("kernels/*/reference.py")
    }
    assert {one["kernel"] for one in found["kernels"]} == kernels
    for one in found["kernels"]:
        assert one["agrees"] or (one["device"] == "gpu" and one["why"])


def test_a_kernel_that_differs_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.CHECKS, "bits", lambda device: False)
    told = run("doctor")
    assert told.code == 1
    assert "not what the reference gives: bits on the cpu" in told.err and "torch" in told.err
