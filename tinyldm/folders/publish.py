"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub -> its address. ValueError, with advice, where that fails: the folder stays."""
    from huggingface_hub import HfApi  # imported here because it takes a third of a second

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Exported with tinyldm"))
    except Exception as error:      # no network, no token, no right, a server error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{folder} is written, and uploading it to {repository} failed ({reason}): set HF_TOKEN to a token that may "
                         f"write, then hf upload {repository} {folder}") from error
