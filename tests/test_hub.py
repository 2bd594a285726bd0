"""The hub client is the real one; the hub is a stand-in on 127.0.0.1, in a process of its own with an empty cache."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wallx_jax import hub

# Serves one model and one dataset repository, prints {"port": ...} and then what each requested resolve() gave.
SCRIPT = r"""
import hashlib, json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle", "meta/info.json": b"[]"}
SHA = "0123456789abcdef0123456789abcdef01234567"

class Hub(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_HEAD(self): self.answer()
    def do_GET(self): self.answer()
    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
    def answer(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            kind, repo, revision = parts[1], "/".join(parts[2:4]), parts[5]
            if repo == "acme/gated":
                return self.send(403, X_Error_Code="GatedRepo")
            if repo == "acme/broken":
                return self.send(500)
            if repo not in ("acme/model", "acme/data"):
                return self.send(404, X_Error_Code="RepoNotFound")
            if revision not in ("main", "v1", SHA):
                return self.send(404, X_Error_Code="RevisionNotFound")
            info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]}
            return self.send(200, json.dumps(info).encode(), Content_Type="application/json")
        name = "/".join(parts[parts.index("resolve") + 2 :])
        etag = '"' + hashlib.sha1(FILES[name]).hexdigest() + '"'
        self.send(200, FILES[name], ETag=etag, X_Repo_Commit=SHA)

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from wallx_jax import hub

for request in json.loads(sys.argv[1]):
    if request == "shutdown":
        server.shutdown()
        server.server_close()
        continue
    try:
        path = hub.resolve(**request)
        print(json.dumps(sorted(str(x.relative_to(path)) for x in path.rglob("*") if x.is_file())))
    except FileNotFoundError as error:
        print(json.dumps(str(error)))
"""


def run(tmp_path: Path, *requests, offline=False) -> list:
    """What `resolve` gives for each request in a process without a cache: a list of files, or the error's text."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(requests)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_download_then_cache(tmp_path):
    model = {"path_or_repo": "acme/model"}
    answers = run(
        tmp_path,
        model,
        {"path_or_repo": "acme/model", "revision": "v1", "patterns": ["*.bin"]},
        {"path_or_repo": "acme/data", "kind": "dataset"},
        "shutdown",
        model,
    )
    weights = ["config.json", "meta/info.json", "model.safetensors"]
    everything = sorted([*weights, "pytorch_model.bin"])
    assert answers[0] == weights  # a model's pickles stay where they are
    assert "pytorch_model.bin" in answers[1]
    assert answers[2] == everything
    assert answers[3] == everything  # both revisions are one commit
    assert run(tmp_path, model, offline=True) == [everything]


def test_what_cannot_be_fetched_is_said_in_one_line(tmp_path):
    messages = run(
        tmp_path,
        {"path_or_repo": "acme/nothing"},
        {"path_or_repo": "acme/model", "revision": "v9"},
        {"path_or_repo": "acme/gated"},
        {"path_or_repo": "acme/broken"},
        "shutdown",
        {"path_or_repo": "acme/model"},
    )
    reasons = ["no such repository", "no such revision", "accept its terms", "HfHubHTTPError", "no network"]
    for message, reason in zip(messages, reasons, strict=True):
        assert reason in message
        assert "\n" not in message
        assert str(tmp_path / "hf" / "hub") in message


def test_offline_says_what_was_looked_for_and_where_to_put_it(tmp_path):
    request = {"path_or_repo": "acme/data", "kind": "dataset", "revision": "v1"}
    (message,) = run(tmp_path, request, offline=True)
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


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="give the folder"):
        hub.resolve(tmp_path / "model.safetensors")
