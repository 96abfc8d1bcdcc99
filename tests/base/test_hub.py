"""Models and datasets of the hub without a network: what is found where, and the sentence for each fault.

The cache folder has the layout of the hub's own client (see hub_cache.py). Faults are the exceptions that the client
itself raises.
"""

import errno
import importlib
import re
import shutil

import huggingface_hub
import pytest
from hub_cache import add_repository
from huggingface_hub import errors

from helpers.base import hub
from helpers.base.hub import HubError, fetch

# The HTTP library of the hub's client; its versions have different ones
httpx = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
FILES = {"config.json": b"{}", "unet/model.safetensors": b"weights"}
COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client, and no network."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("COURSE_LOCAL", raising=False)
    return folder


@pytest.fixture
def downloads(cache, monkeypatch):
    """What a download does: downloads[name] is an exception to raise or files to put into the cache. Logs who asked."""
    answers, asked, real = {}, [], huggingface_hub.snapshot_download

    def snapshot_download(name, local_files_only=False, revision=None, repo_type="model", **settings):
        if local_files_only:
            return real(name, local_files_only=True, revision=revision, repo_type=repo_type, **settings)
        asked.append((name, revision))
        answer = answers[name]
        if isinstance(answer, Exception):
            raise answer
        return str(add_repository(cache, repo_type, name, revision or COMMIT, answer))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    answers["asked"] = asked
    return answers


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/a/b"))


def raised_from(error, cause):
    """The error as if raised while another one was handled, which is how the client wraps them."""
    error.__cause__ = cause
    return error


# --- where things are looked for ---------------------------------------------------------------------------------


def test_the_cache_is_read_without_asking_anyone(cache, downloads):
    add_repository(cache, "model", "a/b", COMMIT, FILES)
    found = fetch("it", [("a/b", COMMIT)], needed=list(FILES))
    assert (found.name, found.commit, downloads["asked"]) == ("a/b", COMMIT, [])
    assert (found.folder / "unet/model.safetensors").read_bytes() == b"weights"


def test_a_mirror_in_the_cache_comes_before_a_download(cache, downloads):
    add_repository(cache, "model", "c/mirror", OTHER, FILES)
    found = fetch("it", [("a/b", COMMIT), ("c/mirror", OTHER)], needed=list(FILES))
    assert (found.name, downloads["asked"]) == ("c/mirror", [])


def test_a_copy_in_the_cache_that_lacks_a_file_is_no_copy(cache, downloads):
    add_repository(cache, "model", "a/b", COMMIT, {"config.json": b"{}"})
    downloads["a/b"] = FILES
    found = fetch("it", [("a/b", COMMIT)], needed=list(FILES))
    assert downloads["asked"] == [("a/b", COMMIT)] and (found.folder / "unet/model.safetensors").exists()


def test_another_revision_in_the_cache_is_another_thing(cache, downloads):
    add_repository(cache, "model", "a/b", OTHER, FILES)
    downloads["a/b"] = FILES
    assert fetch("it", [("a/b", COMMIT)]).commit == COMMIT
    assert downloads["asked"] == [("a/b", COMMIT)]


def test_a_download_that_was_stopped_goes_on(cache, downloads):
    """The client leaves what it was fetching behind; what is complete so far may load, with fewer rows."""
    add_repository(cache, "dataset", "a/data", COMMIT, FILES)
    left = cache / "datasets--a--data" / "blobs" / "0123.incomplete"
    left.write_bytes(b"half of it")
    downloads["a/data"] = FILES | {"more.parquet": b"rows"}
    assert (fetch("it", [("a/data", COMMIT)], "dataset").folder / "more.parquet").exists()
    assert downloads["asked"] == [("a/data", COMMIT)]
    left.unlink()
    fetch("it", [("a/data", COMMIT)], "dataset")
    assert len(downloads["asked"]) == 1


def test_either_of_two_files_will_do(tmp_path):
    hub.check_complete(tmp_path, [])
    with pytest.raises(HubError, match="has no vocab.json"):
        hub.check_complete(tmp_path, ["vocab.json|tokenizer.json"])
    (tmp_path / "tokenizer.json").write_text("{}")
    hub.check_complete(tmp_path, ["vocab.json|tokenizer.json"])


def test_a_file_that_arrived_damaged_is_deleted_and_named(cache, downloads):
    """The client names a large file by the SHA-256 that the hub publishes, and compares sizes only."""
    downloads["a/b"] = FILES
    found = fetch("it", [("a/b", COMMIT)])
    hub.check_hashes(found.folder)
    file = found.folder / "unet/model.safetensors"
    blob = file.resolve()
    blob.write_bytes(b"weighty")
    with pytest.raises(HubError, match=r"unet/model.safetensors arrived damaged: the same command downloads it again"):
        hub.check_hashes(found.folder)
    assert not blob.exists() and not file.is_symlink()
    hub.check_hashes(found.folder)  # the others are whole


def test_a_download_is_compared_with_its_hashes(downloads, monkeypatch):
    downloads["a/b"] = FILES
    monkeypatch.setattr(hub, "file_hash", lambda path: "0" * 64)
    with pytest.raises(HubError, match="arrived damaged"):
        fetch("it", [("a/b", COMMIT)])


def test_mirrors_are_asked_in_order(downloads):
    downloads.update({"a/b": errors.RepositoryNotFoundError("gone", response=response(404)), "c/d": FILES})
    found = fetch("it", [("a/b", COMMIT), ("c/d", OTHER)])
    assert (found.name, found.commit) == ("c/d", OTHER)
    assert downloads["asked"] == [("a/b", COMMIT), ("c/d", OTHER)]


def test_without_a_pin_the_commit_of_the_first_download_is_kept(cache, downloads):
    downloads["a/data"] = FILES
    first = fetch("it", [("a/data", None)], "dataset")
    again = fetch("it", [("a/data", None)], "dataset")
    assert first == again and first.commit == COMMIT
    assert downloads["asked"] == [("a/data", None)]


@pytest.mark.parametrize("place", ["a/b", "b"])
def test_ones_own_copy_comes_before_everything(cache, downloads, tmp_path, monkeypatch, place):
    add_repository(cache, "model", "a/b", COMMIT, FILES)
    own = tmp_path / "own" / place
    (own / "unet").mkdir(parents=True)
    for name, content in FILES.items():
        (own / name).write_bytes(content)
    monkeypatch.setenv("COURSE_LOCAL", str(tmp_path / "own"))
    found = fetch("it", [("a/b", COMMIT)], needed=list(FILES))
    assert (found.folder, found.commit, downloads["asked"]) == (own, None, [])
    (own / "unet/model.safetensors").unlink()
    with pytest.raises(HubError, match="has no unet/model.safetensors"):
        fetch("it", [("a/b", COMMIT)], needed=list(FILES))
    shutil.rmtree(own)
    assert fetch("it", [("a/b", COMMIT)]).commit == COMMIT, "what is not there is looked for elsewhere"


def test_course_local_must_be_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_LOCAL", str(tmp_path / "nowhere"))
    with pytest.raises(HubError, match="COURSE_LOCAL names .*nowhere, which is no folder"):
        fetch("it", [("a/b", None)])


# --- faults ------------------------------------------------------------------------------------------------------

GATED = errors.GatedRepoError("403 Client Error", response=response(403))
FAULTS = {
    "removed": (errors.RepositoryNotFoundError("404 Client Error", response=response(404)), "removed, renamed or made"),
    "disabled": (errors.DisabledRepoError("403 Client Error", response=response(403)), "removed, renamed or made"),
    "gated": (GATED, "accept its terms first: do so at https://huggingface.co/a/b, then log in with `hf auth login`"),
    "revision": (errors.RevisionNotFoundError("404", response=response(404)), f"has no revision {COMMIT} any more"),
    "401": (errors.HfHubHTTPError("401", response=response(401)), "the hub refuses access: log in"),
    "429": (errors.HfHubHTTPError("429", response=response(429)), "asked too often"),
    "500": (errors.HfHubHTTPError("500", response=response(500)), r"the hub itself has trouble \(status 500\)"),
    "500 as the client tells it": (
        raised_from(errors.LocalEntryNotFoundError("not here"), errors.HfHubHTTPError("503", response=response(503))),
        r"the hub itself has trouble \(status 503\)",
    ),
    "no network": (
        raised_from(errors.LocalEntryNotFoundError("not here"), httpx.ConnectError("Name or service not known")),
        "there is no network",
    ),
    "offline": (raised_from(errors.LocalEntryNotFoundError("x"), errors.OfflineModeIsEnabled("x")), "HF_HUB_OFFLINE"),
    "cut": (httpx.RemoteProtocolError("peer closed connection"), "broke off: .* goes on where it stopped"),
    "slow": (httpx.ReadTimeout("timed out"), "the connection broke off"),
    "checksum": (
        OSError("Consistency check failed: file should be of size 10 but has size 7 (model.safetensors)."),
        "a file arrived damaged: the same command downloads it again",
    ),
    "full": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    "other": (ValueError("something\nof many lines"), "a/b: something[);]"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_each_fault_has_its_sentence(downloads, fault, kind):
    error, sentence = FAULTS[fault]
    downloads["a/b"] = error
    with pytest.raises(HubError) as told:
        fetch("Stable Diffusion", [("a/b", COMMIT)], kind)
    text = str(told.value)
    assert text.startswith("cannot get Stable Diffusion (a/b: ") and "\n" not in text
    page = "huggingface.co/datasets/a/b" if kind == "dataset" else "huggingface.co/a/b"
    assert re.search(sentence.replace("huggingface.co/a/b", page), text), text
    assert ("the preset 'mini'" if kind == "model" else "a drawn dataset") in text


def test_every_repository_is_told_of(downloads):
    downloads.update({"a/b": FAULTS["removed"][0], "c/d": FAULTS["500"][0]})
    with pytest.raises(HubError, match="a/b: it was removed.*; c/d: the hub itself has trouble"):
        fetch("it", [("a/b", COMMIT), ("c/d", OTHER)])


def test_a_disk_without_room_is_told_before_the_download(downloads, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000_000))
    downloads["a/b"] = FILES
    with pytest.raises(HubError, match="the download has 5.2 GB and the disk only 2.0 GB free: .*HF_HOME"):
        fetch("it", [("a/b", COMMIT)], download_gb=5.2)
    assert downloads["asked"] == []
    assert fetch("it", [("a/b", COMMIT)], download_gb=1.9).commit == COMMIT


def test_what_has_arrived_already_needs_no_room(cache, downloads, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    blobs = cache / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123.incomplete").write_bytes(bytes(9000))
    downloads["a/b"] = FILES
    with pytest.raises(HubError, match="make room"):
        fetch("it", [("a/b", COMMIT)], download_gb=10_500e-9)
    assert fetch("it", [("a/b", COMMIT)], download_gb=9_500e-9).commit == COMMIT


def test_a_disk_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(hub.Path, "exists", lambda path: False)
    with pytest.raises(HubError, match="there is no disk for "):
        hub.free_gb(hub.Path("nowhere"))


def test_a_download_that_lacks_a_file_is_refused(downloads):
    downloads["a/b"] = {"config.json": b"{}"}
    with pytest.raises(HubError, match="has no unet/model.safetensors"):
        fetch("it", [("a/b", COMMIT)], needed=["unet/model.safetensors"])


def test_a_copy_is_complete_with_all_its_files(tmp_path):
    (tmp_path / "x").write_text("")
    hub.check_complete(tmp_path, ["x"])
    with pytest.raises(HubError, match="has no y"):
        hub.check_complete(tmp_path, ["x", "y"])
