"""Upload a model folder to the Hugging Face Hub."""

import os
import re
from pathlib import Path

from jobs.errors import ConfigError, ServerUnavailableError, SpecError

SCHEME = "hf://"
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def repository(target: str) -> str | None:
    """
    Return USER/REPO of hf://USER/REPO; None if the target is a folder.

    Raises:
        SpecError: it is not of this form.
        ConfigError: huggingface-hub is not installed.
    """
    if not target.startswith(SCHEME):
        return None
    name = target.removeprefix(SCHEME)
    if not REPOSITORY.fullmatch(name):
        raise SpecError(f"{target[:200]!r} is not a repository", hint="hf://USER/REPO, e.g. hf://ada/faces")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            f"huggingface-hub cannot be imported: {exc}",
            hint="pip install 'ganq[hub]', or write a folder: --to model/",
        ) from exc
    return name


def upload(folder: Path, name: str, message: str, *, private: bool) -> str:
    """
    Upload a folder as one commit; create the repository if there is none.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: the Hub refuses it, e.g. because nobody is logged in.
        ServerUnavailableError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except LocalTokenNotFoundError as exc:
        raise _not_logged_in("nobody is logged in to the Hugging Face Hub") from exc
    except HfHubHTTPError as exc:
        status = getattr(exc.response, "status_code", None)
        said = " ".join((exc.server_message or str(exc)).split())[:300]
        if status in (401, 403):
            raise _not_logged_in(f"{api.endpoint} refuses to write {name}: {said}") from exc
        raise ConfigError(f"{api.endpoint} did not take {name} (HTTP {status}): {said}") from exc
    except Exception as exc:  # of its HTTP library, which differs from version to version
        if "connect" not in type(exc).__name__.lower() and "timeout" not in type(exc).__name__.lower():
            raise
        raise ServerUnavailableError(
            f"{api.endpoint} cannot be reached: {str(exc)[:200].lower()}",
            hint="try again, or write a folder: --to model/",
        ) from exc
    return str(done.commit_url)


def _not_logged_in(message: str) -> ConfigError:
    return ConfigError(message, hint="hf auth login, or HF_TOKEN: a token with write access")
