"""Serving the rating page until ctrl-c or SIGTERM."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from diffscale.core.cache import cache_dir
from diffscale.core.errors import UserError
from diffscale.preference.server import RatingServer
from diffscale.preference.study import Study


def serve(study: Study, goal: int, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve the page of a study. on_ready: called with the raters' link.

    Raises UserError if it cannot listen at the address.
    """
    server = RatingServer(study, goal, token_of(study.study_id))
    asyncio.run(_serve(server, host, port, on_ready))


async def _serve(server: RatingServer, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    runner = web.AppRunner(server.app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        raise UserError(
            setting="--host, --port", value=f"{host}:{port}", expected="a free address", reason=str(error)
        ) from None
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    (address, number), *_ = runner.addresses
    on_ready(f"http://{address}:{number}/?token={server.token}")
    await stop.wait()
    await runner.cleanup()


def token_of(study_id: str) -> str:
    """Return the token of a study's links on this machine, so that a link still works after a restart."""
    file: Path = cache_dir() / "preference" / f"{study_id}.token"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_urlsafe(24))
    except FileExistsError:
        pass
    return file.read_text()
