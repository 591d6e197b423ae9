"""An exported folder, to the Hugging Face Hub."""

import shlex
from pathlib import Path

from gptcli.data.hub import require_reachable
from gptcli.errors import ConfigError, StorageError


def require_repository(name: str) -> None:
    """Refuse a name that no repository can have, and a push without a login, before any work.

    Raises:
        ConfigError: With how to mend it.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).rstrip(".")
        raise ConfigError(f"--push {name}: {reason}", "write it as org/name") from error
    if "/" not in name:
        raise ConfigError(f"--push {name}: the organization is missing", "write it as org/name")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push: HF_HUB_OFFLINE is set", "unset it, or leave --push out")
    if get_token() is None:
        hint = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        raise ConfigError("--push: not logged in to the Hub", hint)


def push(folder: Path, name: str) -> str:
    """Upload a folder to the repository `name`, created if needed; return its address.

    Raises:
        StorageError: It failed; the folder stays, and the hint says how to push it again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    again = shlex.join(["hf", "upload", name, str(folder)])
    try:
        require_reachable()
        api = HfApi()
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="gpt export")
    except Exception as error:  # of dozens of kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise StorageError(
            f"{folder} is written but not pushed to {name}: {reason}", f"push it again: {again}"
        ) from error
    return str(url)
