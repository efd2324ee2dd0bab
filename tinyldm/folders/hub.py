"""Where weights come from: a path, or the id of a repository on the Hugging Face hub.

An id is OWNER/NAME, or OWNER/NAME@REVISION for a branch, a tag or a commit. Only the files that are needed are
downloaded, into huggingface_hub's own cache; HF_HUB_OFFLINE=1, HF_HOME and HF_TOKEN mean what they mean there.
Without a network what is in the cache is used. A path that exists is always a path.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

Choose = Callable[[set[str]], list[str]]        # all file names of a repository -> those that are needed


def is_hub_id(source: str | Path) -> bool:
    """Whether this is meant as a hub id: it looks like one, and no such path exists."""
    return isinstance(source, str) and bool(HUB_ID.fullmatch(source)) and not Path(source).exists()


def hub_id(source: str | Path) -> str | None:
    """'stabilityai/sd-vae-ft-mse@main' -> 'stabilityai/sd-vae-ft-mse'; None for a path."""
    return HUB_ID.fullmatch(source)["id"] if is_hub_id(source) else None


def locate(source: str | Path, needed: Choose) -> Path:
    """The local path of a source; of a hub id, the cached folder, in which what `needed` names has been downloaded.

    ValueError, with what to do, for a path or repository that is not there or may not be read.
    """
    if not is_hub_id(source):
        if not Path(source).exists():
            raise ValueError(f"{source} does not exist: name a folder, a .safetensors or .ckpt file, or a hub id such as "
                             "stable-diffusion-v1-5/stable-diffusion-v1-5")
        return Path(source)
    found = HUB_ID.fullmatch(str(source))
    return fetch(found["id"], found["revision"], needed)


def fetch(repo_id: str, revision: str | None, needed: Choose) -> Path:
    from huggingface_hub import HfApi, snapshot_download  # only here: it takes a third of a second to import
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{repo_id}@{revision}" if revision else repo_id
    wanted = None
    try:
        names = {sibling.rfilename for sibling in HfApi().model_info(repo_id, revision=revision).siblings or []}
        if wanted := needed(names):
            # By its name and not its commit, or the cache would not know the commit by that name when there is no network.
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[
                re.sub(r"([*?[])", r"[\1]", name) for name in wanted]))
    except GatedRepoError as error:
        raise ValueError(f"{where} is gated: accept its licence on its hub page, then set HF_TOKEN to a token of yours") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision {revision or 'main'}: leave it out for the newest") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{where} is neither a path here nor a repository on the hub (or a private one: set HF_TOKEN)") from error
    except Exception as error:      # no network, offline mode, a proxy, a server's bad day: the cache may still have it
        return _cached(where, repo_id, revision, (lambda names: wanted) if wanted else needed, error)
    raise ValueError(f"{where} holds none of the files that are needed ({len(names)} files: "
                     f"{', '.join(sorted(names)[:5])}, ...): is it the repository of another kind of model?")


def _cached(where: str, repo_id: str, revision: str | None, needed: Choose, cause: Exception) -> Path:
    from huggingface_hub import snapshot_download

    reason = " ".join(str(cause).split())[:120] or type(cause).__name__
    hint = (f"and downloading failed ({type(cause).__name__}: {reason}): run once with a network, or copy the repository's "
            f"folder here and name its path")
    try:                            # no pattern: it would insist on all files of the repository, and checks nothing else
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))
    except Exception as error:
        raise ValueError(f"{where} is not a path here, is not in the cache, {hint}") from error
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    wanted = needed(names)
    if not wanted or set(wanted) - names:
        raise ValueError(f"{where} is in the cache only in part, {hint}")
    return folder
