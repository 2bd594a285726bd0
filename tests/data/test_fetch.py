"""Datasets of the hub: which revision is taken, and that no more is fetched than is used. The client is the real one;
the hub is a stand-in on 127.0.0.1, and each test has an empty cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import edits, synthetic
from helpers.hub_stand_in import HubStandIn

from wallx_jax.data.fetch import data_files, video_files
from wallx_jax.data.metadata import read_info

HIGH, WRIST = synthetic.CAMERAS
ROOT = Path(__file__).parents[2]
# Reads a dataset's metadata, fetches what is missing, reads each frame; prints one line of JSON.
SCRIPT = r"""
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="LOG %(message)s", stream=sys.stderr)
from wallx_jax.data.fetch import fetch
from wallx_jax.data.lerobot import LeRobotSource, read_info
request = json.loads(sys.argv[1])
try:
    info = read_info("acme/arm", request.get("revision"), request.get("episodes"))
    cameras = request.get("cameras", list(info.camera_keys))
    fetch(info, cameras, request.get("first_only", False))
    files = sorted(str(p.relative_to(info.root)) for p in info.root.rglob("*") if p.is_file())
    frames = None
    if not request.get("first_only"):
        source = LeRobotSource(info, 2, cameras)
        samples = map(source.__getitem__, range(len(source)))
        frames = [(sample.episode, sample.frame, len(sample.images)) for sample in samples]
    print(json.dumps({"root": str(info.root), "commit": info.commit, "files": files, "frames": frames}))
except (OSError, ValueError) as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dataset of four episodes, a file each, in format v3.0, and what other revisions hold."""
    base = tmp_path_factory.mktemp("hub")
    options = {"data_files_size_in_mb": 1e-6, "video_files_size_in_mb": 1e-6}
    current = synthetic.write_dataset(base / "v3.0", **options)
    (current / "README.md").write_text("a large file that nobody needs")
    old = shutil.copytree(current, base / "v2.1")
    edits.edit_info(old, lambda info: info.update(codebase_version="v2.1"))
    return {"v3.0": current, "v2.1": old}


@pytest.fixture
def hub(folders):
    with HubStandIn({"acme/arm": {"main": folders["v2.1"], "v2.1": folders["v2.1"], "v3.0": folders["v3.0"]}}) as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    def run(offline=False, **request):
        environment = {
            "PATH": os.environ["PATH"],
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", SCRIPT, json.dumps(request)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        run.log = done.stderr
        return json.loads(done.stdout)

    return run


def meta(files):
    return [file for file in files if file.startswith("meta/")]


def test_the_newest_readable_tag_is_taken_and_all_of_its_files(hub, client, folders):
    found = client()
    assert found["commit"] == hub.commit("acme/arm", "v3.0") and found["root"].endswith(found["commit"])
    assert "acme/arm: revision v3.0 of v2.1, v3.0" in client.log
    assert [tuple(frame[:2]) for frame in found["frames"]] == [
        (e, f) for e, n in enumerate(synthetic.LENGTHS) for f in range(n)
    ]
    expected = sorted(str(p.relative_to(folders["v3.0"])) for p in folders["v3.0"].rglob("*") if p.is_file())
    assert found["files"] == [file for file in expected if file != "README.md"]
    assert "fetching acme/arm" in client.log and "12/12" in client.log, "a bar: 4 tables and 8 videos"
    hub.served.clear()
    assert client() == found and not hub.served, "what is there is not fetched again"


def test_only_what_is_used_is_fetched(client, folders):
    found = client(episodes="1,3", cameras=[WRIST])
    info = read_info(folders["v3.0"], episodes="1,3")
    wanted = sorted([*data_files(info), *video_files(info, WRIST)])
    assert [file for file in found["files"] if not file.startswith("meta/")] == wanted and len(wanted) == 4
    assert {frame[0] for frame in found["frames"]} == {1, 3} and found["frames"][0][2] == 1
    more = client(episodes="0", cameras=[WRIST, HIGH])
    assert len(more["files"]) == len(found["files"]) + 3, "and more when more is used"


def test_a_dry_run_needs_one_video_of_each_camera(client):
    found = client(first_only=True)
    assert [file for file in found["files"] if file.endswith(".mp4")] == [
        f"videos/{camera}/chunk-000/file-000.mp4" for camera in sorted(synthetic.CAMERAS)
    ]


def test_a_revision_that_is_named_is_taken(hub, client):
    assert "is in LeRobot format v2.1; convert it to v3.0" in client(revision="main")
    assert client(revision="v3.0")["commit"] == hub.commit("acme/arm", "v3.0")
    assert "no such revision" in client(revision="v9")


def test_tags_that_cannot_be_read_are_named(hub, client, folders):
    hub.repos["acme/arm"] = {"main": folders["v3.0"], "v1.6": folders["v2.1"], "v2.1": folders["v2.1"],
                             "v4.0": folders["v2.1"], "stable": folders["v3.0"]}  # fmt: skip
    message = client()
    assert message.startswith("FileNotFoundError: dataset 'acme/arm' has the versions v1.6, v2.1, v4.0, none of them")
    hub.repos["acme/arm"] = {"main": folders["v3.0"], "stable": folders["v3.0"]}
    assert client()["commit"] == hub.commit("acme/arm", "main"), "without any version main is as good as any"


def test_an_interrupted_download_goes_on(hub, client, folders):
    name = video_files(read_info(folders["v3.0"]), HIGH)[2]
    size = (folders["v3.0"] / name).stat().st_size
    hub.break_after[name] = size // 2
    first = client()
    if isinstance(first, str):  # the client gave up: nothing half is left, and the next start goes on
        assert name in first and "try again" in first and "\n" not in first
        first = client()
    assert len(first["frames"]) == 26
    assert hub.bytes_sent[name] < 2 * size, "the first half was not sent again"


@pytest.mark.medium
def test_without_a_network_the_cache_serves(hub, client):
    message = client(offline=True)
    assert "HF_HUB_OFFLINE is set" in message and "hf download acme/arm --repo-type dataset" in message
    found = client(episodes="0:2")
    assert client(offline=True, episodes="0:2") == found, "also the tag that was taken is known"
    message = client(offline=True)
    assert "could not be fetched (HF_HUB_OFFLINE is set)" in message and "file-00" in message


def test_no_such_repository(hub, client):
    hub.repos["acme/other"] = hub.repos.pop("acme/arm")
    message = client()
    assert "dataset 'acme/arm'" in message and "no such repository" in message and "lerobot's cache" in message


@pytest.mark.medium
def test_a_file_that_the_repository_lacks(client, folders, hub, tmp_path):
    root = shutil.copytree(folders["v3.0"], tmp_path / "partial")
    missing = root / "data/chunk-000/file-002.parquet"
    missing.unlink()
    hub.repos["acme/arm"]["v3.0"] = root
    message = client()
    assert "data/chunk-000/file-002.parquet of dataset 'acme/arm'" in message and "(no such file)" in message
    assert len(client(episodes="0:2")["frames"]) == 12
