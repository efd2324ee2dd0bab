"""Finds the files of a source: a path, or the id of a repository on the Hugging Face hub.

An id is OWNER/NAME, or OWNER/NAME@REVISION for a branch, a tag or a commit. Only the files that are needed are
downloaded, into huggingface_hub's own cache; HF_HUB_OFFLINE=1, HF_HOME and HF_TOKEN work as with huggingface_hub.
Without a network the cached files are used. A source that exists as a path is never taken for an id.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tinyldm.lookup import nearest

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

RUNS = "runs"                                   # where train.py writes by default
Choose = Callable[[set[str]], list[str]]        # all file names of a repository -> names of the files that are needed


def is_hub_id(source: str | Path) -> bool:
    """Whether a source is a hub id: it has the form of one, and no such path exists. runs/NAME, and FOLDER/NAME where that folder is
    here, are paths, also where they are missing: only a revision (FOLDER/NAME@main) says that the hub is meant."""
    found = isinstance(source, str) and HUB_ID.fullmatch(source)
    if not found or Path(source).exists():
        return False
    owner, _, _ = source.partition("/")
    return bool(found["revision"]) or not (owner == RUNS or Path(owner).is_dir())


def missing(source: str | Path) -> ValueError:
    """The error, with advice, for a source that is neither a path here nor a hub id."""
    folder, name = Path(source).parent, Path(source).name
    near = nearest(name, sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
    if near and folder != Path("."):
        near = near.replace("'", f"'{folder}/", 1)
    where = "" if folder.is_dir() else f"there is no folder {folder} here; "
    hub = f", or {source}@main if the hub's is meant" if isinstance(source, str) and HUB_ID.fullmatch(source) else ""
    return ValueError(f"{source} does not exist: {near or where}name a run, a model folder, a .safetensors or .ckpt file, or a hub id "
                      f"such as stable-diffusion-v1-5/stable-diffusion-v1-5{hub}")


def hub_id(source: str | Path) -> str | None:
    """'stabilityai/sd-vae-ft-mse@main' -> 'stabilityai/sd-vae-ft-mse'; None for a path."""
    return HUB_ID.fullmatch(source)["id"] if is_hub_id(source) else None


def locate(source: str | Path, needed: Choose) -> Path:
    """The local path of a source. For a hub id it is the cached folder, after the files that `needed` names are downloaded.

    ValueError, with advice, for a path or repository that does not exist or may not be read.
    """
    if not is_hub_id(source):
        if not Path(source).exists():
            raise missing(source)
        return Path(source)
    found = HUB_ID.fullmatch(str(source))
    return fetch(found["id"], found["revision"], needed)


def fetch(repo_id: str, revision: str | None, needed: Choose) -> Path:
    from huggingface_hub import HfApi, snapshot_download  # imported here because it takes a third of a second
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{repo_id}@{revision}" if revision else repo_id
    wanted = None
    try:
        names = {sibling.rfilename for sibling in HfApi().model_info(repo_id, revision=revision).siblings or []}
        if wanted := needed(names):
            # Asked for by the name of the revision, not by its commit: the cache then also finds it by name without a network.
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[
                re.sub(r"([*?[])", r"[\1]", name) for name in wanted]))
    except GatedRepoError as error:
        raise ValueError(f"{where} is gated: accept its licence on its hub page, then set HF_TOKEN to your token") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision {revision or 'main'}: leave it out for the newest") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{where} is neither a path here nor a repository on the hub (or a private one: set HF_TOKEN)") from error
    except Exception as error:      # no network, offline mode, a proxy, a server error: the cache may still have the files
        return _cached(where, repo_id, revision, (lambda names: wanted) if wanted else needed, error)
    raise ValueError(f"{where} holds none of the files that are needed ({len(names)} files: "
                     f"{', '.join(sorted(names)[:5])}, ...): is it the repository of another kind of model?")


def _cached(where: str, repo_id: str, revision: str | None, needed: Choose, cause: Exception) -> Path:
    from huggingface_hub import snapshot_download

    reason = " ".join(str(cause).split())[:120] or type(cause).__name__
    hint = (f"and downloading failed ({type(cause).__name__}: {reason}): run once with a network, or copy the repository's "
            f"folder here and name its path")
    try:                            # with no patterns allowed, it only looks up the folder and does not require any files
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))
    except Exception as error:
        raise ValueError(f"{where} is not a path here, is not in the cache, {hint}") from error
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    listed = _cached_listing(repo_id, folder.name)
    wanted = set(needed(names) if listed is None else needed(listed))
    if missing := sorted((wanted if listed is None else wanted & listed) - names):
        raise ValueError(f"{where} is incomplete in the cache ({folder / missing[0]} is missing), {hint}")
    if not wanted:
        raise ValueError(f"{where} is incomplete in the cache, {hint}")
    return folder


def _cached_listing(repo_id: str, commit: str) -> set[str] | None:
    """All file names of a repository, which newer versions of huggingface_hub note in their cache (1.22 does not, 1.26 does); None where
    they are not known."""
    try:
        from huggingface_hub import get_cached_repo_tree

        return {file.path for file in get_cached_repo_tree(repo_id, revision=commit)}
    except Exception:
        return None
