"""Storage of runs: small durable reads and writes on a local folder, NFS, s3:// or gs:// (pyarrow.fs)."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from pyarrow import fs as pafs

from diffscale.core import hub
from diffscale.core.cache import home_dir
from diffscale.core.errors import UserError

log = logging.getLogger(__name__)

ENVIRONMENT = "DIFFSCALE_STORAGE"
JOB_VARIABLES = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID")
"""Variables that Ray sets for the program of a submitted job and for its workers."""
SCHEMES = ("s3", "gs", "gcs", "file")
READ_ONLY = ("hf",)  # hf://datasets/OWNER/NAME@COMMIT, the files of a dataset on Hugging Face's hub
S3_ATTEMPTS = 5  # for one call: a bucket that throttles (503 SlowDown) is asked again after growing pauses
S3_PATIENCE = 20.0  # seconds for an answer; after arrow's 3 s a busy server is asked for the same bytes again
GCS_PATIENCE = timedelta(seconds=60)  # for one call; Google's own 15 minutes look like a hang


def default_storage() -> str:
    """Return `$DIFFSCALE_STORAGE`, else `~/diffscale`."""
    return resolve(os.environ.get(ENVIRONMENT) or str(home_dir() / "diffscale"), ENVIRONMENT)


def in_ray_job() -> bool:
    """Return whether this process belongs to a job that was submitted to a Ray cluster."""
    return any(name in os.environ for name in JOB_VARIABLES)


def resolve(uri: str, setting: str = "storage", *, written: bool = True) -> str:
    """Return a place as a URI or an absolute path without `file://`; a relative path starts at the working directory.

    written: whether something is written there that must outlive the command. Such a relative path is a UserError in a
        Ray job, whose working directory is a temporary copy of the uploaded one.
    """
    if not uri:
        raise UserError(setting=setting, value=uri, expected="an absolute path or a URI (s3://bucket/folder)")
    path = os.path.expanduser(uri.removeprefix("file://"))
    if "://" in path or os.path.isabs(path):
        return check_absolute(path, setting, written=written)
    if written and in_ray_job():
        raise UserError(
            setting=setting,
            value=uri,
            expected="an absolute path or a URI (s3://bucket/folder, gs://bucket/folder)",
            reason="the working directory of a Ray job is a temporary copy, deleted after the job",
        )
    return os.path.abspath(path)


def is_remote(uri: str) -> bool:
    """Return whether the place is in an object store."""
    return "://" in uri and not uri.startswith("file://")


def check_absolute(uri: str, setting: str = "storage", *, written: bool = True) -> str:
    """Return the place without `file://`. Raises UserError for a relative path, an unknown scheme or credentials.

    written: whether it must be one that can be written to
    """
    path = uri.removeprefix("file://")
    if is_remote(uri) and "@" in uri.split("://", 1)[1].split("/", 1)[0]:
        raise UserError(
            setting=setting,
            value="a URI with a user and a password in it",
            expected="a URI without credentials",
            fix="give them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role",
        )
    if "://" in uri and uri.split("://", 1)[0] not in SCHEMES + (() if written else READ_ONLY):
        raise UserError(
            setting=setting, value=uri, expected="an absolute path, s3://bucket/folder or gs://bucket/folder"
        )
    if is_remote(uri) and not path.split("://", 1)[1].strip("/"):
        raise UserError(
            setting=setting, value=uri, expected="the name of a bucket after it, such as s3://bucket/folder"
        )
    if is_remote(uri) or os.path.isabs(path):
        return path.rstrip("/") or "/"
    raise UserError(
        setting=setting,
        value=uri,
        expected="an absolute path or a URI (s3://bucket/folder, gs://bucket/folder)",
        fix=f"{setting}={os.path.abspath(path)}",
    )


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the pyarrow filesystem of `uri` and the path inside it.

    `$AWS_ENDPOINT_URL` points s3:// at another server (MinIO, moto), as it does for AWS's own tools, and
    `$STORAGE_EMULATOR_HOST` gs:// at an emulator, as it does for Google's.
    """
    if uri.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        retries = pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)
        fs = pafs.S3FileSystem(
            endpoint_override=endpoint,
            allow_bucket_creation=False,
            retry_strategy=retries,
            request_timeout=S3_PATIENCE,
        )
        return fs, uri[len("s3://") :]
    if uri.startswith(("gs://", "gcs://")):
        inside = uri.split("://", 1)[1]
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            scheme, _, host = emulator.rpartition("://")
            return pafs.GcsFileSystem(
                endpoint_override=host, scheme=scheme or "http", anonymous=True, retry_time_limit=GCS_PATIENCE
            ), inside
        return pafs.GcsFileSystem(retry_time_limit=GCS_PATIENCE), inside
    if uri.startswith("hf://"):
        return pafs.PyFileSystem(pafs.FSSpecHandler(hub.filesystem())), uri[len("hf://") :]
    if is_remote(uri):
        return pafs.FileSystem.from_uri(uri)
    return pafs.LocalFileSystem(), uri.removeprefix("file://")


def unreachable(error: OSError) -> UserError | None:
    """Return the explanation of an object store's refusal or silence, or None for any other error."""
    text = str(error).splitlines()[0][:400] if str(error) else ""
    if "AWS Error" in text:
        fix = "check the bucket's name, AWS_ACCESS_KEY_ID or the machine's role, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL"
    elif "google::cloud::Status" in text:
        fix = (
            "check the bucket's name and the credentials (gcloud auth application-default login, or the machine's role)"
        )
    else:
        return None
    return UserError(setting="storage", value=text, expected="a reachable object store", fix=fix)


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def read_bytes(uri: str) -> bytes:
    """Return the whole file. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    with fs.open_input_stream(path) as file:
        return file.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file of which readers see all or nothing: one PUT, or a synced temporary file and a rename."""
    fs, path = filesystem(uri)
    if is_remote(uri):
        with fs.open_output_stream(path) as file:
            file.write(data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def delete(uri: str) -> None:
    """Delete a file. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    fs.delete_file(path)


def delete_folder(uri: str) -> None:
    """Delete a folder with all that is in it. One that is missing or cannot be deleted is left, and the log says so."""
    fs, path = filesystem(uri)
    try:
        fs.delete_dir(path)
    except OSError as error:
        log.info("%s could not be removed: %s", uri, error)


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of each file in a folder by its name: in an object store one LIST for every 1,000 files."""
    fs, path = filesystem(uri)
    found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.size for info in found if info.type == pafs.FileType.File}


def file_states(uri: str) -> dict[str, tuple[int, int]]:
    """Return the bytes, and the time of the last change in ns, of each file under a remote folder by its URI."""
    fs, path = filesystem(uri)
    scheme = uri.split("://")[0] + "://"
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    return {scheme + i.path: (i.size, i.mtime_ns or 0) for i in found if i.type == pafs.FileType.File}


def list_files(uri: str, suffix: str = "", recursive: bool = False) -> list[str]:
    """Return the full URIs of the files under a folder, sorted; a folder that does not exist has none."""
    fs, path = filesystem(uri)
    if not is_remote(uri):
        found = _local_files(path, recursive)
    else:
        selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
        scheme = uri.split("://")[0] + "://"
        found = (scheme + info.path for info in fs.get_file_info(selector) if info.type == pafs.FileType.File)
    return sorted(name for name in found if name.endswith(suffix) and not Path(name).name.startswith("."))


def _local_files(folder: str, recursive: bool) -> Iterator[str]:
    """Yield the files under a local folder; a folder that links lead to several times is read once.

    pyarrow would follow a link to a parent 40 times, and it cannot list a name that is not UTF-8.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    seen = {os.path.realpath(folder)}
    for path, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        yield from (file for name in files if os.path.isfile(file := os.path.join(path, name)))
        if not recursive:
            return
        new = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(path, name))
            if real not in seen:
                seen.add(real)
                new.append(name)
        folders[:] = new
