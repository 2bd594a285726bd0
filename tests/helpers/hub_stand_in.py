"""A Hugging Face hub on 127.0.0.1 that serves local folders as repositories, and notes what was asked for."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class HubStandIn:
    """`with HubStandIn({"acme/arm": {"main": folder, "v3.0": other}}) as hub:`; models or datasets, main first.

    Attributes:
        endpoint: for HF_ENDPOINT.
        errors: {repo: (HTTP status, the hub's code or None)} of repositories that answer with nothing else.
        served: paths in the repositories whose content was sent, in order.
        bytes_sent: of each of them, all requests together.
        break_after: {path: bytes}: the connection breaks once, when so many bytes of the file were sent.
    """

    def __init__(self, repos: dict[str, dict[str, Path]]):
        self.repos, self.served, self.bytes_sent = repos, [], {}
        self.break_after: dict[str, int] = {}
        self.errors: dict[str, tuple[int, str | None]] = {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                stand_in._answer(self)

            def do_GET(self):
                stand_in._answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit of a tag, branch or commit."""
        folders = self.repos[repo]
        commits = {hashlib.sha1(str(folder).encode()).hexdigest(): folder for folder in folders.values()}
        if revision in commits:
            return revision
        return hashlib.sha1(str(folders[revision]).encode()).hexdigest() if revision in folders else None

    def _folder(self, repo: str, commit: str) -> Path:
        return next(f for f in self.repos[repo].values() if hashlib.sha1(str(f).encode()).hexdigest() == commit)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = request.path.split("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        if is_api or parts[0] == "datasets":
            parts = parts[1:]
        if is_api:
            parts = parts[1:]
        repo, what, *rest = "/".join(parts[:2]), *parts[2:]
        if repo in self.errors:
            status, code = self.errors[repo]
            return self._send(request, status, headers={"X-Error-Code": code} if code else {})
        if repo not in self.repos:
            return self._send(request, 404, headers={"X-Error-Code": "RepoNotFound"})
        if what == "refs":
            refs = [{"name": name, "ref": name, "targetCommit": self.commit(repo, name)} for name in self.repos[repo]]
            branches = [ref for ref in refs if ref["name"] == "main"]
            return self._json(request, {"branches": branches, "tags": refs[len(branches) :], "converts": []})
        commit = self.commit(repo, rest[0])
        if commit is None:
            return self._send(request, 404, headers={"X-Error-Code": "RevisionNotFound"})
        folder = self._folder(repo, commit)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        if what == "tree":
            sizes = {name: (folder / name).stat().st_size for name in names}
            entries = [{"type": "file", "path": n, "size": sizes[n], "oid": _etag(folder / n)} for n in names]
            return self._json(request, entries)
        if what == "revision":
            siblings = [{"rfilename": name} for name in names]
            return self._json(request, {"id": repo, "sha": commit, "siblings": siblings})
        name = "/".join(rest[1:])
        if name not in names:
            return self._send(request, 404, headers={"X-Error-Code": "EntryNotFound"})
        return self._file(request, folder / name, name, commit)

    def _file(self, request: BaseHTTPRequestHandler, file: Path, name: str, commit: str) -> None:
        content, headers = (
            file.read_bytes(),
            {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"},
        )
        status, start = 200, 0
        if wanted := request.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if request.command == "GET":
            self.served.append(name)
        self._send(request, status, content[start:], headers, self.break_after.pop(name, None), name)

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        self._send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, request, status, body=b"", headers=None, stop=None, name=None) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command == "GET":
            sent = body if stop is None else body[:stop]
            if name is not None:
                self.bytes_sent[name] = self.bytes_sent.get(name, 0) + len(sent)
            request.wfile.write(sent)
            if stop is not None:
                request.wfile.flush()
                request.close_connection = True
                request.connection.close()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
