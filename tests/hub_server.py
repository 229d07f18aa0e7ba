"""A server on 127.0.0.1 that speaks the Hugging Face Hub's HTTP API to the real `huggingface_hub` client.

It knows model repositories: create, info, tree, refs, branches, tags, pre-upload, LFS, commit and resolve, with
private repositories and tokens. Small files are answered by `resolve` itself; LFS files by a redirect to
"localhost", which the client takes for another host, as the Hub's storage is. Xet is not spoken: clients set
`HF_HUB_DISABLE_XET=1`.

    with HubServer(folder) as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("org/name")
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".png", ".mp4", ".spm")
DATE = "2026-01-01T00:00:00.000Z"
REPO, REVISION = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("GET", rf"/api/models/{REPO}(/revision/{REVISION})?", "info"),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}(/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/models/{REPO}/refs", "list_refs"),
    ("POST", rf"/api/models/{REPO}/(?P<kind>branch|tag)/{REVISION}", "create_ref"),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})", "lfs_upload"),
    ("GET", rf"/storage/(?P<sha256>[0-9a-f]{{64}})/{REPO}/(?P<path>.+)", "lfs_download"),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", "commit"),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]
# Of each kind of request that a download makes the pattern, for `HubServer.faults`.
DOWNLOADS = {
    "listing": r"GET /api/models/.*",
    "looking": r"HEAD .*/resolve/.*",
    "small file": r"GET .*/resolve/.*\.json",
    "large file": r"GET /storage/.*",
}


@dataclass(frozen=True)
class StoredFile:
    sha256: str
    size: int
    oid: str
    lfs: bool

    def describe(self) -> dict:
        pointer = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 130}
        return {"size": self.size, "oid": self.oid} | ({"lfs": pointer} if self.lfs else {})


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, StoredFile]) -> str:
        tree = json.dumps([sorted((path, file.oid) for path, file in files.items()), ref, len(self.commits)])
        sha = hashlib.sha1(tree.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.body = status, {"error": message} | (body or {})
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class HubServer:
    """The server and its state, which outlives `stop()`.

    Args:
        folder (`Path`): where file contents are kept, named by their sha256.
        users (`dict[str, str]`, *optional*): token to namespace; a token reads and writes its namespace alone.

    `requests` lists "METHOD /path" of every request, `downloads` (repository, file, had a token) of every file sent.
    After `uploads_left` large files, if it is set, it takes no more. `damage` has a function of the content for files, by
    their path in the repository, that are to arrive with another one; `sizes` has the bytes that it says some have.

    `faults` has what goes wrong, by a pattern of "METHOD /path": an iterator of a status (such as 429 or 500), of "cut" (the
    connection ends in the middle of the answer), of "slow" (its content comes in twenty pieces, in a fifth of a second) or of
    seconds (as a float) that the answer comes late, or `None`; one for each request.
    """

    def __init__(self, folder: Path, users: dict[str, str] | None = None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.users = users or {"hf_org": "org", "hf_stranger": "stranger"}
        self.token = next(iter(self.users))
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.downloads: list[tuple[str, str, bool]] = []
        self.uploads_left: int | None = None
        self.damage: dict[str, Callable[[bytes], bytes]] = {}
        self.sizes: dict[str, int] = {}
        self.faults: dict[str, Iterator[int | float | str | None]] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", 0), handler)
        self.endpoint, self.storage = (
            f"http://{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost")
        )
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self, *exc_info) -> None:
        self.server.shutdown()
        self.server.server_close()

    __exit__ = stop

    def files(self, repo: str, revision: str = "main") -> set[str]:
        """Returns the files of a repository, read from the store."""
        repository = self.repositories[repo]
        return set(repository.commits[self._sha(repository, revision)])

    def add(self, repo: str, folder: Path, private: bool = False) -> str:
        """Commits the files of a folder to `main` without a client; returns the commit."""
        repository = self.repositories.setdefault(repo, Repository(private))
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        files = {
            path.relative_to(folder).as_posix(): self._store(path.read_bytes(), path.name.endswith(LFS_SUFFIXES))
            for path in paths
        }
        return repository.commit("refs/heads/main", files)

    def downloaded(self, repo: str) -> set[str]:
        return {path for name, path, _ in self.downloads if name == repo}

    def next_fault(self, request: str) -> int | float | str | None:
        found = (next(faults, None) for pattern, faults in self.faults.items() if re.fullmatch(pattern, request))
        return next((fault for fault in found if fault is not None), None)

    def _described(self, path: str, file: StoredFile) -> dict:
        """Returns the Hub's description of a file."""
        described = file.describe()
        if path in self.sizes:
            for place in (described, described.get("lfs", {})):
                place["size"] = self.sizes[path]
        return described

    def _repo(self, request: "Handler", write: bool = False) -> Repository:
        name = request.args["repo"]
        repository, member = self.repositories.get(name), request.user == name.split("/")[0]
        if repository is None or (repository.private and not member):
            # The Hub does not tell a private repository from a missing one.
            raise HubError(401 if request.user is None else 404, "Repository not found", "RepoNotFound")
        if write and not member:
            raise HubError(401 if request.user is None else 403, f"You have no write access to {name}")
        return repository

    def _ref(self, repository: Repository, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in repository.refs), None)

    def _sha(self, repository: Repository, revision: str) -> str:
        ref = self._ref(repository, revision)
        if ref is None and revision not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.refs[ref] if ref else revision

    def _tree(self, request: "Handler", write: bool = False) -> dict[str, StoredFile]:
        repository = self._repo(request, write)
        return repository.commits[self._sha(repository, request.args["revision"])]

    def _store(self, data: bytes, lfs: bool) -> StoredFile:
        sha256 = hashlib.sha256(data).hexdigest()
        if not (self.folder / sha256).exists():
            (self.folder / sha256).write_bytes(data)
        return self._stored(sha256, lfs, data)

    def _stored(self, sha256: str, lfs: bool, data: bytes | None = None) -> StoredFile:
        if data is None:
            data = (self.folder / sha256).read_bytes()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        blob = pointer if lfs else data
        return StoredFile(sha256, len(data), hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest(), lfs)

    # One method per route: it takes the request and returns (status, body, headers).

    def validate_yaml(self, request):
        return 200, {"errors": [], "warnings": []}, {}

    def create_repo(self, request):
        payload = request.json()
        if payload.get("type") not in (None, "model"):
            raise HubError(400, f"this server holds models only, not a {payload['type']}")
        namespace = payload.get("organization") or request.user
        if request.user is None or namespace != request.user:
            raise HubError(401 if request.user is None else 403, f"You have no write access to {namespace}")
        name = f"{namespace}/{payload['name']}"
        url = f"{self.endpoint}/{name}"
        if name in self.repositories:
            raise HubError(409, "You already created this model repo", body={"url": url})
        private = payload.get("private") or payload.get("visibility") == "private"
        repository = self.repositories[name] = Repository(bool(private))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository.commit("refs/heads/main", {".gitattributes": self._store(attributes.encode(), lfs=False)})
        return 200, {"url": url, "name": name, "id": name}, {}

    def info(self, request):
        repository, name = self._repo(request), request.args["repo"]
        sha = self._sha(repository, request.args["revision"] or "main")
        files = sorted(repository.commits[sha].items())
        siblings = [{"rfilename": path} for path, _ in files]
        if "blobs" in request.query:
            for sibling, (path, file) in zip(siblings, files, strict=True):
                described = self._described(path, file)
                sibling.update(described, blobId=described.pop("oid"))
        data = {"_id": name, "id": name, "modelId": name, "author": name.split("/")[0], "sha": sha}
        data |= {"private": repository.private, "gated": False, "disabled": False, "lastModified": DATE}
        data |= {"createdAt": DATE, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
        if "expand" in request.query:
            data = {key: data[key] for key in ("_id", "id", *request.query["expand"]) if key in data}
        return 200, data, {}

    def tree(self, request):
        files, top = self._tree(request), request.args["path"]
        prefix = f"{top}/" if top else ""
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path, file in sorted(files.items()):
            if path.startswith(prefix):
                parts = path[len(prefix) :].split("/")
                for depth in range(1, len(parts)):
                    folder = prefix + "/".join(parts[:depth])
                    entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
                entries[path] = {"type": "file", "path": path, **self._described(path, file)}
        if top and not entries:
            raise HubError(404, f"{top} does not exist", "EntryNotFound")
        return 200, [e for path, e in entries.items() if recursive or "/" not in path[len(prefix) :]], {}

    def list_refs(self, request):
        refs = self._repo(request).refs.items()
        named = [{"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": sha} for ref, sha in refs]
        branches, tags = ([r for r in named if r["ref"].startswith(f"refs/{k}/")] for k in ("heads", "tags"))
        return 200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}, {}

    def create_ref(self, request):
        repository, payload = self._repo(request, write=True), request.json()
        if request.args["kind"] == "branch":
            ref, start = f"refs/heads/{request.args['revision']}", payload.get("startingPoint", "main")
        else:
            ref, start = f"refs/tags/{payload['tag']}", request.args["revision"]
        if ref in repository.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repository.refs[ref] = self._sha(repository, start)
        return 200, {}, {}

    def preupload(self, request):
        files, answer = self._tree(request, write=True), []
        for item in request.json()["files"]:
            lfs, known = item["path"].endswith(LFS_SUFFIXES) or item["size"] > 10_000_000, files.get(item["path"])
            oid = known and (known.sha256 if lfs else known.oid)
            mode = "lfs" if lfs else "regular"
            answer.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answer}, {}

    def lfs_batch(self, request):
        self._repo(request, write=True)
        objects = [{"oid": o["oid"], "size": o["size"]} for o in request.json()["objects"]]
        for item in objects:
            if not (self.folder / item["oid"]).exists():
                item["actions"] = {"upload": {"href": f"{self.storage}/storage/{item['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_upload(self, request):
        if self.uploads_left == 0:
            raise HubError(400, "the upload was interrupted")
        self.uploads_left = self.uploads_left and self.uploads_left - 1
        if hashlib.sha256(request.body).hexdigest() != request.args["sha256"]:
            raise HubError(400, "the content does not match its sha256")
        self._store(request.body, lfs=True)
        return 200, {}, {}

    def lfs_download(self, request):
        return self._content(request, request.args["sha256"], {"ETag": f'"{request.args["sha256"]}"'})

    def commit(self, request):
        repository, files = self._repo(request, write=True), dict(self._tree(request, write=True))
        ref = self._ref(repository, request.args["revision"])
        if ref is None or not ref.startswith("refs/heads/"):
            raise HubError(400, f"commits go to a branch, not to {request.args['revision']}")
        pull_request = None
        if "create_pr" in request.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref, pull_request = f"refs/pr/{number}", f"{self.endpoint}/{request.args['repo']}/discussions/{number}"
        for line in request.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                files[value["path"]] = self._store(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = self._stored(value["oid"], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: f for path, f in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        sha = repository.commit(ref, files)
        url = f"{self.endpoint}/{request.args['repo']}/commit/{sha}"
        answer = {"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""}
        return 200, answer | ({"pullRequestUrl": pull_request} if pull_request else {}), {}

    def resolve(self, request):
        repository, path = self._repo(request), request.args["path"]
        sha = self._sha(repository, request.args["revision"])
        headers = {"X-Repo-Commit": sha}
        if path not in repository.commits[sha]:
            raise HubError(404, "Entry not found", "EntryNotFound")
        file = repository.commits[sha][path]
        if not file.lfs:
            return self._content(request, file.sha256, headers | {"ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(self.sizes.get(path, file.size))}
        location = f"{self.storage}/storage/{file.sha256}/{request.args['repo']}/{quote(path)}"
        return 302, b"", headers | {"Location": location}

    def _content(self, request, sha256: str, headers: dict):
        data, headers = (self.folder / sha256).read_bytes(), headers | {"Accept-Ranges": "bytes"}
        if request.command == "GET":
            has_token = "Authorization" in request.headers
            self.downloads.append((request.args["repo"], request.args["path"], has_token))
            data = self.damage.get(request.args["path"], bytes)(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return 206, data[start : end + 1], headers
        return 200, data, headers


class Server(ThreadingHTTPServer):
    # The client opens eight connections at once. The kernel drops those above the default of 5, which costs a second each.
    request_queue_size = 128


def _wait(seconds: float) -> None:
    """Also where a test shortens `time.sleep` for the client, which runs in the same process."""
    threading.Event().wait(seconds)


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {unquote(url.path)}"
        with self.hub.lock:
            fault = self.hub.next_fault(request)
        if isinstance(fault, float):
            _wait(fault)
        with self.hub.lock:
            self.hub.requests.append(request)
            try:
                if isinstance(fault, int):
                    raise HubError(fault, f"the Hub answers {fault}")
                status, body, headers = self._route(url.path)
            except HubError as error:
                status, body, headers = error.status, error.body, error.headers
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), headers | {"Content-Type": "application/json"}
        self.send_response(status)
        # A connection left open in the client's pool would outlive `stop()`.
        for name, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        # Whoever asked may be gone.
        with contextlib.suppress(ConnectionError):
            if self.command != "HEAD" and fault == "slow":
                size = len(body) // 20 + 1
                for start in range(0, len(body), size):
                    _wait(0.01)
                    self.wfile.write(body[start : start + size])
            elif self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def json(self) -> dict:
        return json.loads(self.body)

    def _route(self, path: str):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user = self.hub.users.get(token)
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == {"HEAD": "GET"}.get(self.command, self.command):
                self.args = {key: value and unquote(value) for key, value in match.groupdict().items()}
                return getattr(self.hub, name)(self)
        raise HubError(404, f"this server does not know {self.command} {path}")

    def log_message(self, *args) -> None:
        """Requests are kept in `hub.requests`, not printed."""
