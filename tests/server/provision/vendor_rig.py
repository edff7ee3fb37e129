"""A repository with two commits, and the folder into which it is fetched."""

from __future__ import annotations

from pathlib import Path

from dinov3_server.provision.vendor import vendor
from tests.server.provision.repositories import BACKBONES, add_commit, beside, git, make_repository


class Rig:
    """A repository with two commits, and the target folder."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "served"
        self.first = make_repository(self.repository)
        self.second = add_commit(self.repository, {"dinov3/new.py": "", BACKBONES: "changed = True\n"})
        self.target = folder / "cache_dir" / "upstream" / "code"

    def vendor(self, revision: str | None = None, **options: bool) -> None:
        vendor(str(self.repository), revision or self.first, self.target, **options)

    def holds(self, revision: str) -> bool:
        """Tell whether git finds the target unmodified, and only its lock is beside it."""
        assert beside(self.target) == ["code", "code.lock"]
        return git(self.target, "rev-parse", "HEAD") == revision and not git(self.target, "status", "--porcelain")

    def content(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.target.rglob("*") if path.is_file()}
