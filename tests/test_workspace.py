from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop_fast import workspace
from dop_fast.config import DataConfig, ModelConfig, TeacherConfig
from dop_fast.errors import ConfigError
from dop_fast.workspace import Workspace


def make(root: Path, path: str = "photos", **stages: dict[str, object]) -> Workspace:
    made = Workspace(
        root, 7, DataConfig(path=path, size=64), TeacherConfig(), ModelConfig("vgg11"), stages
    )
    workspace.create(made)
    return made


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = make(tmp_path, stitch={"sigma": 0.5}, extract={"n_segments": [5, 10]})
    read = workspace.load(tmp_path)
    assert (read.seed, read.data, read.teacher, read.model) == (
        made.seed, made.data, made.teacher, made.model,
    )  # fmt: skip
    assert read.stages["stitch"] == {"sigma": 0.5}
    assert read.stages["extract"] == {"n_segments": [5, 10]}
    assert read.stages["prune"] == {}


def test_every_key_stands_in_the_file_with_its_meaning(tmp_path: Path) -> None:
    make(tmp_path)
    text = (tmp_path / workspace.TOML).read_text(encoding="utf-8")
    for key in ("sigma", "sparsity", "n_segments", "milestones", "layer", "val_share"):
        line = next(
            i for i, row in enumerate(text.splitlines()) if row.startswith((key, f"# {key} ="))
        )
        assert text.splitlines()[line - 1].startswith("# ")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20))
def test_any_path_survives_the_file(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    root = tmp_path_factory.mktemp("w")
    make(root, path)
    assert workspace.load(root).data.path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store = 3", "store must be a path or an address"),
        ("seed = 'x'", "seed must be a whole number"),
        ("[stich]\nsigma = 0.5", "unknown section or key: stich"),
        ("sede = 1", "unknown section or key: sede"),
        ("[stitch]\nsigm = 0.5", "unknown key: sigm"),
        ("[stitch]\nsigma = 2", "sigma must lie in"),
        ("[stitch]\nsigma = '0.5'", r"\[stitch\] sigma must be a number"),
        ("[extract]\nn_segments = 15", "n_segments must be a list, each a whole number, got 15"),
        ("stitch = 3", "unknown section or key: stitch"),
        ("seed = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / workspace.TOML).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        workspace.load(tmp_path)


def test_the_store_is_a_path_seen_from_the_workspace_or_an_address(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert workspace.load(tmp_path).patches == tmp_path / "patches.zarr"
    workspace.create(replace(made, store="s3://bucket/x.zarr"), force=True)
    assert workspace.load(tmp_path).patches == "s3://bucket/x.zarr"


def test_a_path_that_is_no_text_is_refused_at_once(tmp_path: Path) -> None:
    made, other = make(tmp_path / "a"), tmp_path / "\udcff"
    made.root.rename(other)
    with pytest.raises(ConfigError, match=r"not UTF-8: .*\\udcff"):
        workspace.load(other)
    with pytest.raises(ConfigError, match=r"not UTF-8: 'path = .*\\udcff"):
        workspace.create(replace(made, data=replace(made.data, path=str(other))), force=True)


def test_outside_a_workspace_the_hint_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        workspace.load(tmp_path)
    assert "dopfast init" in caught.value.hint
