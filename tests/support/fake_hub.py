"""A fake Hugging Face on loopback, for the real huggingface_hub.

It answers the library's requests for model repositories: `/api/models/OWNER/REPO/revision/REVISION` with the files,
their sizes and LFS hashes, and `/OWNER/REPO/resolve/REVISION/FILE` with the hub's headers; large files are redirected
to a second server, as the hub does to its CDN. Refusals have the status, body and X-Error-Code of the real hub.

with FakeHub() as hub:
    hub.publish("timm/a", {"model.safetensors": data})
    ... HF_ENDPOINT=hub.url ...
    assert hub.fetched() == ["model.safetensors"]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import TracebackType

from tests.support.file_server import Answer, FileServer, Seen

COMMIT = "c0ffee" + "0" * 34


class FakeHub:
    """`hub` answers the API and resolves files; `cdn` has their bytes, at `/FILE`'s sha256."""

    def __init__(self) -> None:
        self.hub, self.cdn = FileServer(), FileServer()
        self._names: dict[str, str] = {}
        self._paths: dict[str, list[str]] = {}

    def __enter__(self) -> FakeHub:
        self.cdn.__enter__()
        self.hub.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hub.__exit__(kind, error, trace)
        self.cdn.__exit__(kind, error, trace)

    @property
    def url(self) -> str:
        return self.hub.url("")

    def publish(
        self,
        repository: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        commit: str = COMMIT,
        wrong_hashes: bool = False,
    ) -> None:
        """Serve `files` at `revision`, which is `commit`. JSON files are plain git files, all others are in LFS."""
        siblings = []
        for name, data in files.items():
            sha256 = hashlib.sha256(b"another" if wrong_hashes else data).hexdigest()
            about: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            path = f"/{repository}/resolve/{commit}/{name}"
            if name.endswith(".json"):
                self.hub.put(path, data, {"ETag": f'"{"b" * 40}"', "X-Repo-Commit": commit})
            else:
                about["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
                self._names[self.blob(data)] = name
                self.cdn.put(self.blob(data), data, {"ETag": f'"{sha256}"'})
                linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
                location = {"Location": self.cdn.url(self.blob(data)) + "?Signature=cdn-secret"}
                self.hub.always(path, Answer(302, headers={**linked, **location}))
            self._paths.setdefault(repository, []).append(path)
            siblings.append(about)
        owner = repository.partition("/")[0]
        info = {"_id": "0", "id": repository, "author": owner, "sha": commit, "siblings": siblings, "tags": []}
        for each in (revision, commit):
            self.hub.put(self.api(repository, each), json.dumps(info).encode(), {"Content-Type": "application/json"})

    def api(self, repository: str, revision: str = "main") -> str:
        """Return the path of the repository's description."""
        return f"/api/models/{repository}/revision/{revision}"

    def blob(self, data: bytes) -> str:
        """Return the path of these bytes on the CDN."""
        return f"/blobs/{hashlib.sha256(data).hexdigest()}"

    def gate(self, repository: str, status: int = 403) -> None:
        """Refuse the files, but not the description: 401 without a token, 403 with one without access."""
        for path in self._paths[repository]:
            self.hub.always(path, self.refusal(status, "GatedRepo", "Access to this model is restricted."))

    def refuse_token(self, repository: str) -> None:
        """Answer as the hub does to an unknown token."""
        words = "Invalid credentials in Authorization header"
        self.hub.always(self.api(repository), self.refusal(401, None, words))

    def refusal(self, status: int, code: str | None, words: str) -> Answer:
        headers = {"Content-Type": "application/json", "X-Error-Message": words}
        if code:
            headers["X-Error-Code"] = code
        return Answer(status, body=json.dumps({"error": words}).encode(), headers=headers)

    def asked(self) -> list[Seen]:
        """Return the requests to the API and to `resolve`, without the library's own one about its user agent."""
        return [seen for seen in self.hub.requests if seen.path != "/api/agent-harnesses"]

    def fetched(self) -> list[str]:
        """Return the names of the fetched large files, one per request."""
        return [self._names[seen.path] for seen in self.cdn.requests if seen.method == "GET"]
