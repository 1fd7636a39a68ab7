"""Compiled regions on disk: found again by the next process, trusted only when this user's own process wrote them.

A file holds the graphs of one region. Its name stands for what the region is; its header tells the facts that the
code depends on, such as the version of PyTorch, so that a file which no longer fits can say why. What is read is code
and would run, so nothing is read before its owner, permissions and HMAC are checked: the key is a file that only this
user can read.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from .environment import difference
from .fingerprint import digest

log = logging.getLogger(__name__)

# Raise it when an older file would be read wrongly.
_MAGIC = b"HotPath1"
_CHECKS = struct.Struct("<8s32s32s")
_SIZE = struct.Struct("<Q")
_SUFFIX = ".graphs"
_STALE_SECONDS = 3600
FIRST_TIME = "miss: nothing was stored yet"
DEFAULT_LIMIT = 1 << 30


class Refused(Exception):
    """A file is not read; the message says why."""


@dataclass(frozen=True)
class Stored:
    """What a file holds: what the region is, the facts its code depends on, and its graphs."""

    region: str
    facts: Mapping[str, str]
    graphs: tuple[bytes, ...]


class Store:
    """Files of one folder, which is made for this user alone, up to ``limit`` bytes; the least recently used go first.

    Several processes may use one folder: a file appears whole or not at all.
    """

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self._lock = threading.Lock()

    def path(self, region: str) -> Path:
        return self.folder / f"{digest(region)}{_SUFFIX}"

    def is_empty(self) -> bool:
        """Whether nothing is stored of any region."""
        return next(self.folder.glob(f"*{_SUFFIX}"), None) is None

    def read(self, region: str) -> Stored | None:
        """What is stored of ``region``, whatever its facts; None when nothing is.

        Raises:
            Refused: the file is damaged, or not this user's own.
        """
        path = self.path(region)
        try:
            if not path.exists():
                return None
            key = self.key()
            _check_private(path)
            stored = unpack(path.read_bytes(), key)
            os.utime(path)
        except OSError as error:
            raise Refused(f"{path} can't be read ({error.strerror})") from error
        if stored.region != region:
            raise Refused(f"{path} is of another region")
        return stored

    def write(self, stored: Stored) -> None:
        """Replace what is stored of that region, and drop what has not been used for longest.

        Raises:
            Refused: the folder is not this user's own.
            OSError: it can't be written; what was there stays.
        """
        with self._lock:
            key = self.key()
            write_whole(self.path(stored.region), pack(stored, key))
            self._shrink()

    def key(self) -> bytes:
        """This user's key, made at the first use. Raises Refused when others could know it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(self.folder)
        path = self.folder / "key"
        if not path.exists():
            unfinished = path.with_name(f".key-{secrets.token_hex(4)}")
            try:
                _write_new(unfinished, secrets.token_bytes(32))
                # Of two processes that make one, the first wins.
                with suppress(FileExistsError):
                    os.link(unfinished, path)
            except OSError:
                # Not every file system links.
                if not path.exists():
                    os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        _check_private(path, readable=False)
        key = path.read_bytes()
        if len(key) != 32:
            raise Refused(f"{path} is damaged; delete it")
        return key

    def _shrink(self) -> None:
        """Drop files until the folder is within its limit, and what a crash left."""
        known = []
        for path in self.folder.iterdir():
            # Another process may have dropped it.
            with suppress(OSError):
                status = path.stat()
                if path.suffix == _SUFFIX:
                    known.append((status.st_mtime, status.st_size, path))
                elif path.suffix == ".part" and time.time() - status.st_mtime > _STALE_SECONDS:
                    path.unlink()
        total = sum(size for _, size, _ in known)
        for _, size, path in sorted(known):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size


class Kept:
    """What is kept of one region: what its file held at the start, and what is compiled since.

    ``state`` says in plain words how that went, beginning with ``hit``, ``miss`` or ``off``.
    """

    def __init__(self, store: Store, region: str, facts: Callable[[], Mapping[str, str]]) -> None:
        self.state = FIRST_TIME
        self.store = store
        self.region = region
        self.facts = facts
        self._graphs: list[tuple[Mapping[str, str], bytes]] = []

    @property
    def path(self) -> Path:
        return self.store.path(self.region)

    def read(self) -> list[bytes]:
        """The stored graphs that fit this process; says why when there are none."""
        now = self.facts()
        try:
            stored = self.store.read(self.region)
        except Refused as reason:
            self.refuse(str(reason))
            return []
        if stored is None:
            return []
        if other := difference(stored.facts, now):
            self.state = f"miss: {other}"
            log.info("stored compiled blocks don't fit: %s", other)
            return []
        self._graphs = [(now, graph) for graph in stored.graphs]
        self.state = "hit"
        return list(stored.graphs)

    def refuse(self, reason: str) -> None:
        """Stored graphs can't be used, which is worth a line in the log; they will be replaced."""
        self._graphs.clear()
        self.state = f"miss: {reason}"
        log.warning("stored compiled blocks are not used: %s", reason)

    def add(self, graph: bytes, facts: Mapping[str, str]) -> None:
        """Store ``graph``, which was compiled under ``facts``, beside those of the same facts."""
        self._graphs.append((facts, graph))
        try:
            self.store.write(self.stored(facts))
        except (Refused, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self.state = f"{self.state}; not stored: {reason}"
            log.warning("compiled blocks can't be stored in %s: %s", self.store.folder, reason)

    def stored(self, facts: Mapping[str, str] | None = None) -> Stored:
        """The graphs of ``facts``, by default of those of now."""
        facts = self.facts() if facts is None else facts
        return Stored(self.region, facts, tuple(graph for made, graph in self._graphs if made == facts))


class NotKept:
    """Graphs are compiled ahead of time and end with the process."""

    def facts(self) -> Mapping[str, str]:
        """None are needed."""
        return {}


def pack(stored: Stored, key: bytes) -> bytes:
    """``stored`` as a file: marker, SHA-256 and HMAC of the rest, header, graphs."""
    header = {"region": stored.region, "facts": dict(stored.facts), "sizes": [len(graph) for graph in stored.graphs]}
    text = json.dumps(header).encode()
    body = b"".join((_SIZE.pack(len(text)), text, *stored.graphs))
    return _CHECKS.pack(_MAGIC, sha256(body).digest(), hmac.digest(key, body, "sha256")) + body


def unpack(data: bytes, key: bytes | None) -> Stored:
    """What ``pack`` packed. Without a ``key`` it is only checked to be whole, and may be from anywhere.

    Raises:
        Refused: it is cut off or altered, or was packed with another key.
    """
    if len(data) < _CHECKS.size + _SIZE.size or data[: len(_MAGIC)] != _MAGIC:
        raise Refused("the file is damaged, or no file of compiled blocks of this version")
    _, whole, signature = _CHECKS.unpack_from(data)
    body = data[_CHECKS.size :]
    if not hmac.compare_digest(sha256(body).digest(), whole):
        raise Refused("the file is damaged")
    if key is not None and not hmac.compare_digest(hmac.digest(key, body, "sha256"), signature):
        raise Refused("the file was not written by this user's ComfyUI")
    (size,) = _SIZE.unpack_from(body)
    start = _SIZE.size + size
    header = json.loads(body[_SIZE.size : start])
    graphs = []
    for length in header["sizes"]:
        graphs.append(body[start : start + length])
        start += length
    return Stored(header["region"], header["facts"], tuple(graphs))


def write_bundle(path: Path, entries: Sequence[Stored], store: Store) -> int:
    """Write ``entries`` as one file, signed by this user; returns its size in bytes. Raises Refused or OSError."""
    packed = [pack(entry, store.key()) for entry in entries]
    data = pack(Stored("bundle", {}, tuple(packed)), store.key())
    write_whole(path, data)
    return len(data)


def read_bundle(path: Path, store: Store, foreign: bool) -> list[Stored]:
    """Put the entries of a bundle into ``store``, signed by this user, and return them.

    Args:
        foreign: take it wherever it is from.

    Raises:
        Refused: it is damaged, or not this user's own and not ``foreign``.
        OSError: it can't be read, or not be stored.
    """
    if not foreign:
        _check_private(path)
    key = None if foreign else store.key()
    entries = [unpack(packed, key) for packed in unpack(path.read_bytes(), key).graphs]
    for entry in entries:
        store.write(entry)
    return entries


def write_whole(path: Path, data: bytes) -> None:
    """Write ``path`` so that it is whole or as before, whatever happens. Raises OSError."""
    unfinished = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.part")
    try:
        _write_new(unfinished, data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _check_private(path: Path, readable: bool = True) -> None:
    """Raise Refused unless ``path`` is this user's and others can't write it, nor read it unless ``readable``.

    Windows has neither owners nor modes in this form; there the HMAC alone decides.
    """
    if sys.platform == "win32":
        return
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise Refused(f"{path} is a link")
    if status.st_uid != os.getuid():
        raise Refused(f"{path} belongs to another user")
    if status.st_mode & (0o022 if readable else 0o077):
        fix = "go-w" if readable else "go="
        raise Refused(f"{path} is open to other users; run: chmod {fix} {path}")
