"""The hub client is the real one, in a process of its own with an empty cache; the hub is a stand-in on 127.0.0.1."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_stand_in import HubStandIn

from wallx_jax.utils import hub

# Prints what each requested resolve() gave: a list of files, or the error's text.
SCRIPT = r"""
import json, sys
from wallx_jax.utils import hub
for request in json.loads(sys.argv[1]):
    try:
        path = hub.resolve(**request)
        print(json.dumps(sorted(str(x.relative_to(path)) for x in path.rglob("*") if x.is_file())))
    except OSError as error:
        print(json.dumps(str(error)))
"""
MODEL = {"path_or_repo": "acme/model"}


@pytest.fixture
def server(tmp_path):
    """A model and a dataset with the same files, and repositories that answer with an error."""
    folder = tmp_path / "repository"
    (folder / "meta").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "meta/info.json"):
        (folder / name).write_text(name)
    repos = {name: {"main": folder, "v1": folder} for name in ("acme/model", "acme/data")}
    with HubStandIn(repos) as server:
        server.errors |= {"acme/gated": (403, "GatedRepo"), "acme/broken": (500, None)}
        yield server


@pytest.fixture
def run(server, tmp_path):
    def run(*requests, offline=False, endpoint=None) -> list:
        """What `resolve` gives for each request, in a process of its own; the cache is the test's."""
        environment = {
            "PATH": "/usr/bin:/bin",
            "HF_ENDPOINT": endpoint or server.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(requests)],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_download_then_cache(run):
    answers = run(
        MODEL, {**MODEL, "revision": "v1", "patterns": ["*.bin"]}, {"path_or_repo": "acme/data", "kind": "dataset"}
    )
    weights = ["config.json", "meta/info.json", "model.safetensors"]
    everything = sorted([*weights, "pytorch_model.bin"])
    assert answers[0] == weights  # a model's pickles stay where they are
    assert "pytorch_model.bin" in answers[1]
    assert answers[2] == everything
    assert run(MODEL, endpoint="http://127.0.0.1:9") == [everything], "nobody answers there; both revisions are one"
    assert run(MODEL, offline=True) == [everything]


def test_what_cannot_be_fetched_is_said_in_one_line(run, tmp_path):
    names = ("acme/nothing", "acme/gated", "acme/broken")
    messages = run({**MODEL, "revision": "v9"}, *({"path_or_repo": name} for name in names))
    messages += run(MODEL, endpoint="http://127.0.0.1:9")
    reasons = ["no such revision", "no such repository", "accept its terms", "HfHubHTTPError", "no network"]
    for message, reason in zip(messages, reasons, strict=True):
        assert reason in message
        assert "\n" not in message
        assert str(tmp_path / "hf" / "hub") in message


def test_offline_says_what_was_looked_for_and_where_to_put_it(run, tmp_path):
    request = {"path_or_repo": "acme/data", "kind": "dataset", "revision": "v1"}
    (message,) = run(request, offline=True)
    for part in (
        "dataset 'acme/data' (revision v1)", str(tmp_path / "hf" / "hub"), "HF_HUB_OFFLINE is set",
        "hf download acme/data --repo-type dataset --revision v1",
    ):  # fmt: skip
        assert part in message
    assert "\n" not in message


def test_a_local_folder_wins_over_a_repository(tmp_path, monkeypatch):
    (tmp_path / "acme" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("acme/model", revision="v1") == Path("acme/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/acme/model") == tmp_path / "acme" / "model"


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./model", "a/b/c", "../model", "", "acme/mo del"])
def test_what_can_only_be_a_path_is_not_looked_up(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        hub.resolve(name)


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("name", ["mine/arm", "runs/arm"])
def test_a_path_into_a_folder_that_is_here_is_no_repository(run, server, tmp_path, name, kind):
    """`server` has both: nobody is asked. runs/ is where our commands write, whether it is there or not."""
    server.repos |= {"mine/arm": server.repos["acme/model"], "runs/arm": server.repos["acme/model"]}
    (tmp_path / "mine" / "arn").mkdir(parents=True)
    (message,) = run({"path_or_repo": name, "kind": kind})
    assert message.startswith(f"{kind} folder {name!r} does not exist: ") and "\n" not in message
    assert not server.served
    if name == "mine/arm":
        assert f"{tmp_path / 'mine'} has no 'arm' (did you mean 'arn'?)" in message
        what = " --repo-type dataset" if kind == "dataset" else ""
        assert message.endswith(f"if the hub's repository is meant, fetch it first: hf download mine/arm{what}")
    else:
        assert "hf download" not in message


def test_a_repository_that_was_fetched_is_found_beside_a_folder_of_its_owners_name(run, tmp_path):
    (files,) = run(MODEL)
    (tmp_path / "acme").mkdir()
    assert run(MODEL) == [files] == run(MODEL, offline=True)


def test_what_is_there_in_place_of_a_path(tmp_path):
    (tmp_path / "models" / "wall-oss").mkdir(parents=True)
    for name, hint in (
        ("models/wal-oss/step", f"{tmp_path / 'models'} has no 'wal-oss' (did you mean 'wall-oss'?)"),
        ("else/where", f"{tmp_path} has no 'else'"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            hub.resolve(tmp_path / name)
        assert str(error.value) == f"model folder {str(tmp_path / name)!r} does not exist: {hint}"
    with pytest.raises(FileNotFoundError, match="write a repository of the hub as OWNER/NAME"):
        hub.resolve("hf://acme/model")


def test_a_cache_that_cannot_be_written_is_called_that(run, tmp_path):
    (tmp_path / "hf").write_text("a file is in the way of HF_HOME")
    (message,) = run(MODEL)
    assert "the hub's cache" in message and "cannot be written" in message and "set HF_HOME" in message
    assert str(tmp_path / "hf") in message and "\n" not in message and "neither a folder" not in message


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="give the folder"):
        hub.resolve(tmp_path / "model.safetensors")
