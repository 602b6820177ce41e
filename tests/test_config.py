import dataclasses
import math

import pytest

from dop_fast.config import ExtractConfig, PruneConfig, StitchConfig, TrainConfig
from dop_fast.errors import ConfigError

STAGES = (ExtractConfig, PruneConfig, StitchConfig, TrainConfig)


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_has_a_help_text(stage: type) -> None:
    for item in dataclasses.fields(stage):
        assert len(item.metadata["help"]) > 5, item.name


@pytest.mark.parametrize("sigma", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_sigma_outside_the_open_interval_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma must lie in"):
        StitchConfig(sigma=sigma)


@pytest.mark.parametrize("sparsity", [1.0, -0.01, math.nan])
def test_sparsity_outside_its_interval_is_refused(sparsity: float) -> None:
    with pytest.raises(ConfigError, match="sparsity must lie in"):
        PruneConfig(sparsity=sparsity)


def test_sparsity_zero_is_allowed() -> None:
    assert PruneConfig(sparsity=0).sparsity == 0


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="epochs must be a whole number"):
        TrainConfig(epochs=1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="epochs must be a whole number"):
        TrainConfig(epochs=True)


def test_members_of_a_list_are_checked() -> None:
    with pytest.raises(ConfigError, match="n_segments"):
        ExtractConfig(n_segments=(15, 0))


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig.from_dict({"sparcity": 0.5}, "prune")
    assert "sparcity" in caught.value.message
    assert "sparsity" in caught.value.hint


def test_an_unknown_choice_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig(material="stiched")
    assert "stitched" in caught.value.hint


@pytest.mark.parametrize("stage", STAGES)
def test_settings_survive_a_round_trip(stage: type) -> None:
    config = stage()
    assert stage.from_dict(config.to_dict(), "x") == config
