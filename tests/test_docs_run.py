"""The README and the pages that teach: every block runs, in order, on a tiny set of photographs.

Where a page begins with a network and images that take hours, its workspace gets small ones.
"""

import os
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from small_space import NETWORK, SETTINGS
from torch import nn

import dop_fast
from dop_fast import criteria, models
from dop_fast.cli.main import dopfast

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/tutorial.md", "docs/api.md", "docs/criterion.md", "docs/own-model.md")
NEEDS = {"README.md": ("onnxscript",), "docs/own-model.md": ("timm", "transformers", "onnxscript")}
LARGE = {"README.md": "photos", "docs/tutorial.md": "flowers.zip"}
"""Pages that are about large networks, and their images."""
MEASURED = ("docs/results.md", "docs/reliability.md")
"""Pages of several workspaces, whose commands take hours: their numbers are made small."""
SMALL = {"epochs": "1", "per-class": "2", "budget": "12", "splits": "1", "batch-size": "12"}
BLOCK = re.compile(r"```(python|console|sh)\n(.*?)```", re.S)


SANITY = "[sanity]\nstart = 6\nbudget = 12\nper_class = 2\n"
SWEEP = """
criteria = ["random"]
materials = ["images"]
sparsities = [0.5]
seeds = 1
[finetune]
epochs = 1
batch_size = 12
"""


def photographs(images: Path, folder: Path) -> None:
    """Write the classes that pages speak of, as a folder and as a zip of it, each image thrice."""
    names = {"blue": "roses", "green": "sunflowers", "red": "tulips"}
    for image in sorted(images.rglob("*.png")):
        part, name, file = image.relative_to(images).parts
        target = folder / "photos" / part / names[name]
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(3):
            shutil.copyfile(image, target / f"{copy}-{file}")
    shutil.make_archive(str(folder / "flowers"), "zip", folder / "photos")


def begin_anew(folder: Path, images: Path) -> None:
    """Go to a new folder with the files that measured workspaces begin with."""
    folder.mkdir()
    for name in ("part.zip", "cifar10.zip", "flowers.zip"):
        shutil.copyfile(images, folder / name)
    for name in ("cifar10-short.toml", "cifar10-crops.toml"):
        (folder / name).write_text(SWEEP, encoding="utf-8")
    teacher = models.build("resnet20", 3, 0)
    models.save_weights(folder / "resnet20_cifar10.safetensors", teacher, {})
    os.chdir(folder)


def in_small(line: str) -> str:
    for name, number in SMALL.items():
        line = re.sub(rf"(--{name}) \S+", rf"\1 {number}", line)
    return line


def command(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        runpy.run_path(arguments[0])
        return
    assert program == "dopfast"
    done = CliRunner().invoke(dopfast, arguments, auto_envvar_prefix="DOPFAST")
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"


def make_small(images: str) -> None:
    """Give the workspace that `init` made a small network, and short stages."""
    Path("net.py").write_text(NETWORK, encoding="utf-8")
    text = SETTINGS.replace('path = "data"', f'path = "{images}"')
    text = text.replace("\nimages = 8\n", "\nimages = 24\n")  # enough for the tutorial's sanity
    text = text.replace("max_members = 8", "max_members = 40")
    Path("dopfast.toml").write_text(text + SANITY, encoding="utf-8")


def given() -> dict[str, object]:
    """Return what a reader of the README brings along."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 3))
    batches = [(torch.randn(6, 3, 8, 8), torch.arange(6) % 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"dop_fast": dop_fast, "model": model, "batches": batches, "optimizer": optimizer}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(
    page: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    photographs(tiny_images, tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("cifar10-table1.toml").write_text(SWEEP, encoding="utf-8")  # in place of dopfast's
    # where the page says that a criterion's file goes
    monkeypatch.setattr(
        criteria, "__path__", [*criteria.__path__, str(tmp_path / "dop_fast/criteria")]
    )
    names = given() if page == "README.md" else {}
    for kind, block in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        file = re.match(r"# (\S+\.py)\n", block)
        if kind != "python":
            for line in block.splitlines():
                if line.startswith("make "):
                    continue  # the demo and the tests have tests of their own
                command(line.removeprefix("$ "))
                if page in LARGE and "dopfast init" in line:
                    make_small(LARGE[page])
        elif file:
            Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(file[1]).write_text(block, encoding="utf-8")
        else:
            exec(compile(block, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", MEASURED)
def test_every_command_of_a_measured_page_runs_in_small(
    page: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs(tiny_images, tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    for number, (kind, block) in enumerate(blocks):
        if kind == "python":
            exec(compile(block, page, "exec"), {})
            continue
        for line in block.replace("$ ", "").splitlines():
            if line == "dopfast demo":
                continue  # it has tests of its own
            if "dopfast init" in line:
                begin_anew(tmp_path / str(number), tmp_path / "flowers.zip")
            command(in_small(line))
            if "dopfast init" in line:
                make_small("flowers.zip")
            if "safetensors" in line:  # its teacher was trained already
                small = models.build("net:small", 3, 0, Path.cwd())
                models.save_weights(Path("teacher.safetensors"), small, {})
