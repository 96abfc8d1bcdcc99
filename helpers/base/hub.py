"""Models and datasets of the Hugging Face hub: where they are looked for, and one sentence for whatever goes wrong.

Looked for in this order:

1. in the folder that the environment variable COURSE_LOCAL names, as OWNER/NAME or as NAME: a copy of one's own;
2. in the hub client's cache on this machine, the repository first, then its mirrors;
3. on the hub, in the same order, each at its pinned revision.

A repository without a pinned revision keeps the commit that its first download found.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from helpers.base.paths import runs_folder
from helpers.base.provenance import file_hash

Repository = tuple[str, str | None]  # OWNER/NAME, and a commit, tag or branch; None means the branch main


class HubError(ValueError):
    """A model or dataset cannot be had; the message says of each place why, and what to do."""


@dataclass(frozen=True)
class Copy:
    """A repository's files on this machine. commit: None for a copy of one's own, which may be anything."""

    folder: Path
    name: str
    commit: str | None


def fetch(
    what: str,
    repositories: Sequence[Repository],
    kind: str = "model",
    patterns: Sequence[str] | None = None,
    needed: Sequence[str] = (),
    download_gb: float = 0.0,
) -> Copy:
    """The first of the repositories that can be had, downloaded if it is not on this machine.

    what: how an error names the thing. kind: "model" or "dataset". patterns: which files are downloaded (default: all).
    needed: files without which a copy is not complete. download_gb: size of the download, in 10^9 bytes.
    Raises HubError.
    """
    if found := find_local(repositories, needed):
        return found
    locks = runs_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"hub-{repositories[0][0].replace('/', '--')}.lock"):  # one process downloads, others find it
        return find_cached(repositories, kind, patterns, needed) or download(
            what, repositories, kind, patterns, needed, download_gb
        )


def download(
    what: str,
    repositories: Sequence[Repository],
    kind: str,
    patterns: Sequence[str] | None,
    needed: Sequence[str],
    download_gb: float,
) -> Copy:
    """The first of the repositories that the hub has. Raises HubError, which tells of each why not."""
    from huggingface_hub import snapshot_download

    reasons = []
    for name, revision in repositories:
        try:
            check_disk(download_gb - arrived_gb(name, kind))
            folder = Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))
            check_complete(folder, needed)
            check_hashes(folder)
            return Copy(folder, name, folder.name)
        except Exception as error:  # the hub's client and what it stands on raise many kinds
            reasons.append(f"{name}: {reason(error, name, kind, revision)}")
    mini = "the preset 'mini'" if kind == "model" else "a drawn dataset"
    raise HubError(
        f"cannot get {what} ({'; '.join(reasons)}). Mend that, or name a folder with a copy of your own by the "
        f"environment variable COURSE_LOCAL, or choose {mini}, which needs no download"
    )


# --- on this machine ---------------------------------------------------------------------------------------------
def local_folder() -> Path | None:
    """The folder of one's own copies, or None. Raises HubError when COURSE_LOCAL names no folder."""
    named = os.environ.get("COURSE_LOCAL")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise HubError(f"the environment variable COURSE_LOCAL names {named}, which is no folder")
    return folder


def find_local(repositories: Sequence[Repository], needed: Sequence[str] = ()) -> Copy | None:
    """One's own copy of one of the repositories. Raises HubError when it is not complete."""
    root = local_folder()
    if root is None:
        return None
    for name, _ in repositories:
        for folder in (root / name, root / name.split("/")[-1]):
            if folder.is_dir():
                check_complete(folder, needed)
                return Copy(folder, name, None)
    return None


def find_cached(
    repositories: Sequence[Repository],
    kind: str = "model",
    patterns: Sequence[str] | None = None,
    needed: Sequence[str] = (),
) -> Copy | None:
    """A complete copy of one of the repositories in the hub client's cache. Asks nobody outside of this machine."""
    from huggingface_hub import snapshot_download

    for name, revision in repositories:
        ask = {"repo_type": kind, "revision": revision, "allow_patterns": patterns, "local_files_only": True}
        try:
            folder = Path(snapshot_download(name, **ask))
            check_complete(folder, needed)
            if any(blobs_folder(name, kind).glob("*.incomplete")):  # left by a download that was stopped
                continue
        except (OSError, HubError):  # its "not there" and "not complete" are OSErrors
            continue
        return Copy(folder, name, folder.name)
    return None


def check_complete(folder: Path, needed: Sequence[str]) -> None:
    """Raises HubError, naming the first that is missing, unless the folder has all the files ("a|b": a or b)."""
    for file in needed:
        if not any((folder / name).is_file() for name in file.split("|")):
            raise HubError(f"it is here only in part: {folder} has no {file.split('|')[0]}")


def check_hashes(folder: Path) -> None:
    """Raises HubError, and deletes the file, unless every large file of a snapshot has the SHA-256 that the hub states.

    The client names such a file, which lies among the blobs, by that hash. It compares sizes only. Where a system has
    no links, the files have other names, and there is nothing to compare with.
    """
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) and file_hash(blob) != blob.name:
            blob.unlink()
            path.unlink()
            raise HubError(f"{path.relative_to(folder)} arrived damaged: the same command downloads it again")


def cache_folder() -> Path:
    """Where the hub client keeps what it downloads; HF_HOME and HF_HUB_CACHE choose it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def free_gb(folder: Path) -> float:
    """Free space, in 10^9 bytes, of the disk that a folder is on or will be on."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if there is None:
        raise HubError(f"there is no disk for {folder}: let HF_HOME name a folder on one that is there")
    return shutil.disk_usage(there).free / 1e9


def blobs_folder(name: str, kind: str) -> Path:
    """Where the client keeps the files of a repository, whole and half downloaded."""
    return cache_folder() / f"{kind}s--{name.replace('/', '--')}" / "blobs"


def arrived_gb(name: str, kind: str) -> float:
    """What is there already of a download that was stopped, in 10^9 bytes."""
    return sum(path.stat().st_size for path in blobs_folder(name, kind).glob("*")) / 1e9


def check_disk(download_gb: float) -> None:
    """Raises HubError when the cache's disk has no room for a download."""
    free = free_gb(cache_folder())
    if free < download_gb:
        raise HubError(
            f"the download has {download_gb:.1f} GB and the disk only {free:.1f} GB free: make room, or let the "
            "environment variable HF_HOME name a folder on another disk"
        )


# --- what went wrong ---------------------------------------------------------------------------------------------
# By name, since the hub's client has changed its HTTP library twice
_NO_NETWORK = {"ConnectError", "ConnectionError", "ConnectTimeout", "OfflineModeIsEnabled", "NameResolutionError"}
_BROKEN_OFF = {"ReadError", "RemoteProtocolError", "ProtocolError", "IncompleteRead", "ChunkedEncodingError"}
_BROKEN_OFF |= {"ReadTimeout", "TimeoutException", "Timeout", "XetDownloadError"}


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it came from, then what that came from …"""
    seen = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__ or current.__context__


def reason(error: Exception, name: str, kind: str, revision: str | None) -> str:
    """What went wrong with a repository, and what to do about it, in one clause."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    for cause in causes(error):
        classes = {c.__name__ for c in type(cause).__mro__}
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, HubError):
            return str(cause)
        if isinstance(cause, errors.GatedRepoError):
            return f"one must accept its terms first: do so at {page}, then log in with `hf auth login`"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"it has no revision {revision} any more: see {page} for what there is"
        if isinstance(cause, errors.RepositoryNotFoundError | errors.DisabledRepoError) or status == 404:
            return "it was removed, renamed or made private"
        if status in (401, 403):
            return "the hub refuses access: log in with `hf auth login`, with a token that may read it"
        if status == 429:
            return "the hub was asked too often: wait some minutes, or log in with `hf auth login`"
        if status is not None and status >= 500:
            return f"the hub itself has trouble (status {status}): try again later"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full: make room, or let HF_HOME name a folder on another disk"
        if "Consistency check failed" in str(cause):
            return "a file arrived damaged: the same command downloads it again"
        if classes & _BROKEN_OFF:
            return "the connection broke off: the same command goes on where it stopped"
        if classes & _NO_NETWORK:
            return "there is no network, or HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "there is no network, and it is not on this machine yet"
    return str(error).strip().split("\n")[0] or repr(error)
