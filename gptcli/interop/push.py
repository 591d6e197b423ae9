"""An exported folder, to the Hugging Face Hub."""

import re
import shlex
from pathlib import Path

from gptcli.data.hub import require_reachable
from gptcli.errors import ConfigError, StorageError

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def require_repository(name: str) -> None:
    """Refuse a name that no repository has, and a push that nobody signs, before any work.

    Raises:
        ConfigError: With how to mend it.
    """
    from huggingface_hub import constants, get_token

    if not _NAME.fullmatch(name):
        raise ConfigError(f"--push {name}: not the name of a repository", "write it as org/name")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push: HF_HUB_OFFLINE is set", "unset it, or leave --push out")
    if get_token() is None:
        hint = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        raise ConfigError("--push: nobody is logged in to the Hub here", hint)


def push(folder: Path, name: str) -> str:
    """Upload a folder as the repository `name`, which is made if need be; return its address.

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
