"""Hugging Face's hub: repositories at a pinned revision, uploads, and its refusals as errors that users understand.

The token comes from the variable HF_TOKEN alone, and HF_ENDPOINT names another server. Needs the extra `hub`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from diffscale.core.errors import UserError
from diffscale.core.text import one_line

TOKEN = "HF_TOKEN"
SCHEME = "hf://"
ID = re.compile(r"(?:hf://)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+?))?(?::(?P<file>[\w./ -]+))?")


class HubId(NamedTuple):
    """A repository, or a file of one: [hf://]owner/name[@revision][:file]."""

    repo: str
    revision: str | None
    file: str | None

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which does not move; the cache may know another one of a branch."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None


def hub_id(text: str) -> HubId | None:
    """Return what an id names, or None for text that is none."""
    found = ID.fullmatch(text)
    return HubId(found["repo"], found["revision"], found["file"]) if found else None


def path_or_id(text: str) -> Path | HubId:
    """Return what a person's text names: a path if something is there, else a repository if it has that form.

    So runs/a is a folder where there is one, ./runs/a is never a repository, and hf://runs/a always is. Of a path with
    nothing at it `pinned` and the caller say so.
    """
    path = Path(text).expanduser()
    return path if path.exists() else hub_id(text) or path


def client() -> Any:
    """Return a huggingface_hub.HfApi. Raises UserError if the package is not installed."""
    return _package().HfApi(**_access())


def filesystem() -> Any:
    """Return the hub's files as an fsspec filesystem, those in its cache from there (hub_files.py).

    Raises UserError if the package is not installed.
    """
    _package()
    from diffscale.core.hub_files import HubFiles  # import cost: an extra

    return HubFiles(**_access())


def keep(uri: str) -> None:
    """Fetch a file of a dataset on the hub that will be read as a whole into the hub's cache; see hub_files.py.

    Does nothing for any other place. Raises UserError for a file that cannot be read.
    """
    if not uri.startswith(SCHEME):
        return
    files = filesystem()
    from diffscale.core import hub_files  # import cost: an extra

    with explained("SOURCE", uri):
        hub_files.keep(uri, files, client())


def _access() -> dict[str, Any]:
    return {"endpoint": os.environ.get("HF_ENDPOINT"), "token": os.environ.get(TOKEN) or False}


def _package() -> Any:
    try:
        import huggingface_hub  # import cost: an extra
    except ImportError:
        raise UserError(
            setting="huggingface_hub", value="not installed", expected="the extra hub", fix="pip install diffscale[hub]"
        ) from None
    return huggingface_hub


class Pinned(NamedTuple):
    """A revision of a repository that does not move."""

    commit: str
    files: list[str]
    licence: str  # as the page says, empty if it does not


def pinned(setting: str, repo: str, revision: str | None, kind: str = "model", text: str = "") -> Pinned:
    """Return the commit of a revision with what it has. Raises UserError for what cannot be read.

    setting: for the error
    revision: branch, tag or commit; None is the main branch
    kind: model or dataset
    text: what a person wrote, if it could have been a path too (`path_or_id`): the error then says both readings
    """
    name = repo if revision is None else f"{repo}@{revision}"
    with explained(setting, text or name, maybe_local=bool(text) and not text.startswith(SCHEME)):
        info = client().repo_info(repo, revision=revision, repo_type=kind)
        client().auth_check(repo, repo_type=kind)  # a gated repository shows its names to everyone
    card = getattr(info, "card_data", None) or {}
    return Pinned(info.sha, sorted(file.rfilename for file in info.siblings), str(card.get("license") or ""))


def cached(repo: str, commit: str, files: Sequence[str]) -> list[Path] | None:
    """Return the files of a model at a commit from the hub's cache, without a network; None unless all are there."""
    found = [_package().try_to_load_from_cache(repo, name, revision=commit) for name in files]
    return [Path(name) for name in found] if all(isinstance(name, str) for name in found) else None


def download(setting: str, repo: str, commit: str, files: Sequence[str]) -> list[Path]:
    """Return local copies of files of a model at a commit, from the hub's own cache or fetched into it."""
    api = client()
    with explained(setting, repo):
        return [Path(api.hf_hub_download(repo, name, revision=commit)) for name in files]


def check_upload(setting: str, repo: str, private: bool) -> None:
    """Raise UserError unless there is a token that the hub knows, and the id is one.

    private: whether the model must be; one that exists keeps its visibility
    """
    if hub_id(repo) is None or ":" in repo or "@" in repo:
        raise UserError(setting=setting, value=repo, expected="OWNER/NAME, a model on the hub")
    if not os.environ.get(TOKEN):
        raise UserError(
            setting=TOKEN, value="", expected="a token of the hub that may write", fix=f"export {TOKEN}=hf_..."
        )
    with explained(setting, repo):
        api = client()
        api.whoami()
        seen = private and api.repo_exists(repo) and not api.repo_info(repo).private
    if seen:
        raise UserError(
            setting=setting,
            value=repo,
            expected="a private model, or one that does not exist yet",
            reason="it exists, and everyone sees it",
            fix="make it private on its page, or take another name",
        )


def upload(setting: str, repo: str, folder: Path, message: str, private: bool) -> None:
    """Write the files of a folder to a model on the hub, in one commit.

    private: of a model that does not exist yet
    """
    api, package = client(), _package()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with explained(setting, repo):
        api.create_repo(repo, private=private, exist_ok=True)
        added = [package.CommitOperationAdd(str(path.relative_to(folder)), path) for path in files]
        api.create_commit(repo, added, commit_message=message)


@contextmanager
def explained(setting: str, value: str, maybe_local: bool = False) -> Iterator[None]:
    """Turn the hub's refusals and a missing network into UserErrors about a setting.

    maybe_local: whether the value could have been a path, at which nothing is
    """
    _package()
    from huggingface_hub import errors  # import cost: an extra

    def refused(expected: str, reason: str, fix: str = "") -> UserError:
        if maybe_local:
            expected = f"a file or folder on this machine, or {expected}"
            reason = f"nothing is at the path {value}; read as a name on the hub: {reason}"
        return UserError(setting=setting, value=value, expected=expected, reason=reason, fix=fix)

    access = f"a token of an account that may read it, in {TOKEN}"
    try:
        yield
    except errors.GatedRepoError:
        reason = "its owner lets only those in who accept its terms"
        raise refused("a repository that you may read", reason, f"accept them on its page; {access}") from None
    except errors.RevisionNotFoundError:
        raise refused("a branch, tag or commit of it", "it has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise refused("a repository on the hub", "it does not exist, or it is private", access) from None
    except errors.EntryNotFoundError as error:
        raise refused("a file of it, and a network", one_line(error.__cause__ or error, 300)) from None
    except errors.HFValidationError as error:
        raise refused("OWNER/NAME", one_line(error, 300)) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            reason = "the hub does not accept the token, or not for this"
            raise refused("a repository that you may use", reason, access) from None
        raise refused("an answer of the hub", f"{status}: {one_line(error, 300)}", "try again later") from None
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        reason = f"no network: {one_line(error, 200)}"
        raise refused("a hub that can be reached", reason, "HF_ENDPOINT names another, HF_HUB_OFFLINE=0") from None
