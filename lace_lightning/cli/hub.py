"""Uploading a folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def check_login(repo: str) -> None:
    """Raise ValueError unless the hub knows who we are and ``repo`` is a name that it can have."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub {repo}: {error}") from error
    except OSError as error:  # no token, one that the hub refuses, or no network
        raise ValueError(f"--push_to_hub {repo}: log in with `hf auth login`, or set HF_TOKEN ({error})") from error


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload all files in one commit; a repository that is there keeps its visibility. Returns its address.

    Raises:
        ValueError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="lace export")
    except HfHubHTTPError as error:
        raise ValueError(f"--push_to_hub {repo}: {folder} is whole, but the hub refused it: {error}") from error
    return str(address)
