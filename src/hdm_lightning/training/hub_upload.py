"""A run's result on the hub: the repository is created before the training and the result uploaded later."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hdm_lightning.errors import UserError, first_line
from hdm_lightning.interop.model_card import LICENSE
from hdm_lightning.training.stages import settings

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@settings
class Hub:
    """Where a run's result is uploaded.

    Attributes:
        push: OWNER/NAME of a repository, created if missing; None uploads nothing.
        at: `end`: when `final/` is written; `stages`: also after every other stage, each upload replacing the last.
        private: whether a new repository is private.
        license: the model's license for its card, by the hub's identifier, e.g. apache-2.0.
    """

    push: str | None = None
    at: Literal["end", "stages"] = "end"
    private: bool = True
    license: str | None = None


def check_name(hub: Hub) -> None:
    """Raise UserError unless `push` is a valid repository name and `license` a valid license identifier."""
    if hub.license is not None and not LICENSE.fullmatch(hub.license):
        hint = "use its identifier, e.g. apache-2.0, cc-by-sa-4.0 or other"
        raise UserError(f"{hub.license!r:.60} is not a license identifier", where="hub.license", hint=hint)
    if hub.push is not None and not _NAME.fullmatch(hub.push):
        raise UserError(f"{hub.push!r} is not OWNER/NAME", where="hub.push", hint="set both, e.g. hub.push=me/my-model")


def reserve(hub: Hub) -> None:
    """Create the repository, so that a refusal by the hub shows before anything is trained.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    if hub.push is None:
        return
    owner = hub.push.partition("/")[0]
    with _hub(f"log in with a token that may write to {owner} (hf auth login), or hub.push=null") as api:
        api.create_repo(hub.push, private=hub.private, exist_ok=True)


def upload(folder: Path, hub: Hub, message: str) -> str:
    """Upload a folder to the repository and return the URL of the commit.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    assert hub.push is not None
    # A refusal does not name the folder: it may be a temporary one.
    with _hub("nothing is lost: the same command uploads the result again") as api:
        done = api.upload_folder(repo_id=hub.push, folder_path=folder, commit_message=message)
    return str(done.commit_url)


@contextmanager
def _hub(hint: str) -> Iterator[Any]:
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow import, and few runs need it)

    try:
        yield HfApi()
    except Exception as error:  # the hub client raises its own errors, its HTTP library's and OSError alike
        raise UserError(f"the hub refused: {first_line(error)}", where="hub.push", hint=hint) from error
