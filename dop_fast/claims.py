"""Who works on what, among processes that share nothing but a folder.

A claim is a file made with O_EXCL: one process makes it, every other one fails to. Its owner
touches it every `BEAT_S`. One that was not touched for `STALE_S`, or whose process is gone from
this machine, may be taken over by making the claim of the next generation, which again only one
process can; the claim that counts is that of the highest generation. Times are compared by the
folder's own clock, so machines need not agree on theirs.
"""

import errno
import glob
import json
import os
import platform
import secrets
import tempfile
import threading
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BEAT_S, STALE_S = 20.0, 300.0
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What file systems that cannot link say, such as exFAT."""


def _machine() -> str:
    """Return what two processes have in common that see each other's ids: containers do not."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()} {space.readlink() if space.is_symlink() else ''}".rstrip()


def owner() -> str:
    """Return what no other process is called, for the names of what it makes for a moment."""
    return f"{_digest()}-{os.getpid()}"


def gone(owner: str) -> bool:
    """Return whether the process of that name has ended, as far as this machine can tell."""
    machine, _, pid = owner.rpartition("-")
    return machine == _digest() and pid.isdecimal() and not _runs(int(pid))


def _digest() -> str:
    return f"{zlib.crc32(_machine().encode()):08x}"


@dataclass(frozen=True)
class Claims:
    """Claims in one folder; keys are file names without an ending."""

    folder: Path

    @cached_property
    def began(self) -> float:
        """When these claims were first asked for this, by the folder's clock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._now()

    def take(self, key: str) -> "Claim | None":
        """Return the claim, to be used as a context; None where another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        top = self._top(key)
        if top >= 0 and self._alive(self._path(key, top)):
            return None
        claim = Claim(self, key, top + 1)
        return claim if self._make(claim) else None

    def holder(self, key: str) -> str:
        """Return the machine and process that have it, or an empty text where it is free."""
        top = self._top(key)
        if top < 0 or not self._alive(path := self._path(key, top)):
            return ""
        owner = _read(path)
        return f"{str(owner.get('machine', '?')).split(' ')[0]}, process {owner.get('pid', '?')}"

    def tidy(self) -> None:
        """Give back what processes had that are gone."""
        names = {path.name.removesuffix(".claim") for path in self.folder.glob("*.claim")}
        for key in {name.rpartition(".")[0] for name in names}:
            claim = self.take(key)
            if claim:
                with claim:
                    pass

    def fail(self, key: str, message: str) -> None:
        """Note that the work on `key` failed, so that no process tries it again by itself."""
        (self.folder / f"{key}.failed").write_text(message, encoding="utf-8")

    def failure(self, key: str, *, since_start: bool = True) -> str:
        """Return why it failed, since these claims `began` or ever; empty where it did not."""
        path = self.folder / f"{key}.failed"
        try:
            recent = path.stat().st_mtime >= self.began
            return path.read_text(encoding="utf-8") if recent or not since_start else ""
        except FileNotFoundError:
            return ""

    def forget_failure(self, key: str) -> None:
        """Let the work on `key` count as not yet tried."""
        (self.folder / f"{key}.failed").unlink(missing_ok=True)

    def _make(self, claim: "Claim") -> bool:
        """Make the claim's file, signed from its first moment on; return whether it was free."""
        for left in self.folder.glob(f"{glob.escape(claim.key)}.*.draft"):
            if gone(left.name[len(claim.key) + 1 : -len(".draft")]):
                left.unlink(missing_ok=True)
        about = {"machine": _machine(), "pid": os.getpid(), "token": claim.token}
        draft = self.folder / f"{claim.key}.{owner()}.draft"
        try:
            draft.write_text(json.dumps(about), encoding="utf-8")
            os.link(draft, claim.path)
        except FileExistsError:  # perhaps by us: over a network an answer may be lost
            return claim.held
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _make_unlinked(claim.path, draft)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _path(self, key: str, generation: int) -> Path:
        return self.folder / f"{key}.{generation}.claim"

    def _top(self, key: str) -> int:
        """Return the generation that counts, -1 where there is none."""
        names = (path.name for path in self.folder.glob("*.claim"))
        parts = (name.removesuffix(".claim").rpartition(".") for name in names)
        return max((int(number) for found, _, number in parts if found == key), default=-1)

    def _alive(self, path: Path) -> bool:
        try:
            age = self._now() - path.stat().st_mtime
        except FileNotFoundError:  # released in this moment
            return False
        owner = _read(path)
        if owner.get("machine") == _machine() and not _runs(owner["pid"]):
            return False
        # made and not yet signed: its owner does both at once, or was killed in between
        return age < (STALE_S if owner else BEAT_S)

    def _now(self) -> float:
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.write(b".")
            file.flush()
            return os.fstat(file.fileno()).st_mtime


@dataclass
class Claim:
    """One claim; as a context it is kept alive, and given back at the end."""

    claims: Claims
    key: str
    generation: int
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def path(self) -> Path:
        """The file that only this claim's owner has made."""
        return self.claims._path(self.key, self.generation)

    @property
    def held(self) -> bool:
        """Whether nobody has taken it over, as one may after `STALE_S` without a sign of life."""
        mine = _read(self.path).get("token") == self.token
        return mine and self.claims._top(self.key) == self.generation

    def __enter__(self) -> Self:
        threading.Thread(target=self._beat, daemon=True, name=f"claim {self.key}").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self.held:
            # older generations first: were this one gone before them, a dead one would count again
            for generation in range(self.generation + 1):
                self.claims._path(self.key, generation).unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S) and self.held:
            try:
                os.utime(self.path)
            except FileNotFoundError:  # given back in this moment
                return


def _make_unlinked(path: Path, draft: Path) -> bool:
    """Copy the draft where a file system has no links; killed in between it leaves no signature."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))
    except FileExistsError:
        return False
    except OSError:  # the disk is full: made, and not signed
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> dict[str, Any]:
    """Return what a claim says of its owner; nothing where it is gone or not yet written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _runs(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not harmless
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
