"""A run's configuration that no reader would take is refused before the run is trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evl_cache.errors import UsageError
from evl_cache.runs.directory import RunConfig, read_run_config, write_run_config

SIZES = {"num_layers": 2, "width": 16, "num_frames": 3, "num_classes": 2, "grid": [2, 2]}
CONFIG = RunConfig(
    head="decoder2",
    head_config=SIZES,
    layers=(1, 2),
    classes=("a", "b"),
    features=None,
    training={},
    caches={},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_run_config(tmp_path / "run", CONFIG)
    assert read_run_config(tmp_path / "run") == CONFIG


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            replace(CONFIG, classes=tuple(f"{i}" + "字" * 200 for i in range(15_000))),
            "no reader takes more than",
        ),
        (replace(CONFIG, head_config=SIZES | {"num_layers": 2000}), "num_layers is 2000, expected 0 to 1024"),
    ],
    ids=["long names of classes", "more layers than heads have"],
)
def test_what_no_reader_takes_is_not_written(config: RunConfig, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        write_run_config(tmp_path / "run", config)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("change", [{"caches": []}, {"caches": {"val": "place"}}, {"training": "adam"}])
def test_what_is_no_object_in_a_configuration_is_refused_in_one_line(change: dict, tmp_path: Path) -> None:
    write_run_config(tmp_path / "run", CONFIG)
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match="not a run's configuration") as refused:
        read_run_config(tmp_path / "run")
    assert "\n" not in str(refused.value)
