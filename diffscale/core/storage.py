"""Where runs live: small durable reads and writes on a local folder, NFS, s3:// or gs:// (pyarrow.fs)."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta
from pathlib import Path

from pyarrow import fs as pafs

from diffscale.core.errors import UserError

ENVIRONMENT = "DIFFSCALE_STORAGE"
SCHEMES = ("s3", "gs", "gcs", "file")
GCS_PATIENCE = timedelta(seconds=60)  # of one call; Google's own 15 minutes look like a hang


def default_storage() -> str:
    """`$DIFFSCALE_STORAGE`, else `~/diffscale`."""
    return os.environ.get(ENVIRONMENT) or str(Path.home() / "diffscale")


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def check_absolute(uri: str, setting: str = "storage") -> str:
    """The same place without `file://`; a relative path is refused (a Ray job's working directory is temporary)."""
    path = uri.removeprefix("file://")
    if is_remote(uri) and "@" in uri.split("://", 1)[1].split("/", 1)[0]:
        raise UserError(
            setting=setting,
            value="a URI with a user and a password in it",
            expected="a URI without credentials",
            fix="give them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role",
        )
    if "://" in uri and uri.split("://", 1)[0] not in SCHEMES:
        raise UserError(
            setting=setting, value=uri, expected="an absolute path, s3://bucket/folder or gs://bucket/folder"
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
    """The pyarrow filesystem of `uri` and the path inside it.

    `$AWS_ENDPOINT_URL` points s3:// at another server (MinIO, moto), as it does for AWS's own tools, and
    `$STORAGE_EMULATOR_HOST` gs:// at an emulator, as it does for Google's.
    """
    if uri.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return pafs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=False), uri[len("s3://") :]
    if uri.startswith(("gs://", "gcs://")):
        inside = uri.split("://", 1)[1]
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            scheme, _, host = emulator.rpartition("://")
            return pafs.GcsFileSystem(
                endpoint_override=host, scheme=scheme or "http", anonymous=True, retry_time_limit=GCS_PATIENCE
            ), inside
        return pafs.GcsFileSystem(retry_time_limit=GCS_PATIENCE), inside
    if is_remote(uri):
        return pafs.FileSystem.from_uri(uri)
    return pafs.LocalFileSystem(), uri.removeprefix("file://")


def unreachable(error: OSError) -> UserError | None:
    """What to tell a person when an object store refuses or does not answer; None for any other error."""
    text = str(error).splitlines()[0][:400] if str(error) else ""
    if "AWS Error" in text:
        fix = "check the bucket's name, AWS_ACCESS_KEY_ID or the machine's role, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL"
    elif "google::cloud::Status" in text:
        fix = (
            "check the bucket's name and the credentials (gcloud auth application-default login, or the machine's role)"
        )
    else:
        return None
    return UserError(setting="storage", value=text, expected="an object store that answers", fix=fix)


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    with fs.open_input_stream(path) as file:
        return file.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Writes the file so that a reader sees all of it or nothing: one PUT, or a synced temporary file and a rename."""
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


def list_files(uri: str, suffix: str = "", recursive: bool = False) -> list[str]:
    """Full URIs of the files under a folder, sorted; a folder that does not exist holds none."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    scheme = uri.split("://")[0] + "://" if is_remote(uri) else ""
    found = (scheme + info.path for info in fs.get_file_info(selector) if info.type == pafs.FileType.File)
    return sorted(name for name in found if name.endswith(suffix) and not Path(name).name.startswith("."))
