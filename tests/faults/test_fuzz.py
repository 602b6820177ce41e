"""Readers of what may be damaged: nothing but DopFastError comes out of them.

Masks are fuzzed in test_masks, images in test_images.
"""

import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_space import SETTINGS

from dop_fast import workspace
from dop_fast.errors import ConfigError, StoreError
from dop_fast.stores import PatchStore

QUICK = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.one_of(
    st.sampled_from(["true", "nan", "-inf", "[]", "[[]]", "{}", "1979-05-27", '""', '"auto"']),
    st.integers().map(str),
    st.floats(allow_nan=False).map(repr),
    st.lists(st.integers(-3, 3)).map(str),
)
LINES = SETTINGS.strip().splitlines()


@given(at=st.integers(0, len(LINES) - 1), value=SCALARS)
@example(at=LINES.index("size = 32"), value="9" * 5000)
@QUICK
def test_a_key_of_any_value_is_taken_or_refused(tmp_path: Path, at: int, value: str) -> None:
    key = LINES[at].partition(" =")[0]
    lines = [*LINES[:at], f"{key} = {value}", *LINES[at + 1 :]]
    (tmp_path / workspace.TOML).write_text("\n".join(lines))
    try:
        workspace.load(tmp_path)
    except ConfigError as error:
        assert error.message and error.hint


@given(start=st.integers(0, len(SETTINGS)), length=st.integers(0, 9), put=st.binary(max_size=9))
@QUICK
def test_a_toml_file_of_any_bytes_is_taken_or_refused(
    tmp_path: Path, start: int, length: int, put: bytes
) -> None:
    whole = SETTINGS.encode()
    (tmp_path / workspace.TOML).write_bytes(whole[:start] + put + whole[start + length :])
    try:
        workspace.load(tmp_path)
    except ConfigError as error:
        assert error.message and error.hint


@pytest.fixture(scope="module")
def store(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(finished / "patches.zarr", tmp_path_factory.mktemp("fuzz") / "x.zarr")


@given(data=st.data())
@settings(QUICK, max_examples=40)
def test_a_store_of_any_bytes_is_read_or_refused(store: Path, data: st.DataObject) -> None:
    files = sorted(path for path in store.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files), "file")
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)), "start")
    length = data.draw(st.sampled_from([0, 1, 9, len(whole)]), "length")
    path.write_bytes(
        whole[:start] + data.draw(st.binary(max_size=9), "put") + whole[start + length :]
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Zarr's, of members that it does not know
            read = PatchStore(store)
            for class_id in range(len(read.header.classes)):
                found = read.concepts(class_id)
                read.sources(found)
            read.stitched()
            read.coverage()
            read.visible()
    except StoreError as error:
        assert error.message and error.hint
    finally:
        path.write_bytes(whole)
