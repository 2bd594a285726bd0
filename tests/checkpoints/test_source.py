"""What a path contains, decided from folders alone."""

import pytest

from wallx_jax.checkpoints.layout import COMMITTED, CheckpointError
from wallx_jax.checkpoints.source import SourceKind, open_source


@pytest.fixture
def run(tmp_path):
    for step in ("2", "10"):
        folder = tmp_path / "run" / "checkpoints" / step
        for item in ("params", "metadata", "assets"):
            (folder / item).mkdir(parents=True)
        (folder / COMMITTED).touch()
    return tmp_path / "run"


def test_a_pytorch_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    source = open_source(tmp_path)
    assert (source.kind, source.folder, source.assets) == (SourceKind.PYTORCH, tmp_path, tmp_path)
    assert not source.is_run and not source.has_processor and source.robots == [] and source.run_config == {}


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_run_is_its_newest_checkpoint(run, below):
    source, step = open_source(run / below), run / "checkpoints" / "10"
    assert (source.kind, source.folder, source.assets) == (SourceKind.CHECKPOINT, step, step / "assets")
    assert source.is_run


def test_a_step(run):
    source = open_source(run / "checkpoints" / "2")
    assert source.is_checkpoint and source.folder.name == "2" and not source.is_run


def test_robots_of_a_checkpoint(run):
    assets = run / "checkpoints" / "10" / "assets"
    for folder in (assets, assets / "robots" / "b", assets / "robots" / "a"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "processor.json").touch()
    source = open_source(run)
    assert source.has_processor and source.robots == ["a", "b"]


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*config\.json"):
        open_source(tmp_path)
