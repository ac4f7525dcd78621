"""A real PostgreSQL on this computer, all of it below one folder and gone with it.

Debian's package postgresql; no cluster of the system is used. The server refuses to run as root, so
root starts it as ``nobody``. It asks for a password, which has letters that a URL must quote.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

USER = "roma"


class Postgres:
    """A running server.

    Attributes:
        password: of the user ``roma``, who may do everything.
        port: on 127.0.0.1.
    """

    def __init__(self, binaries: Path, folder: Path, port: int, password: str) -> None:
        self.binaries, self.folder, self.port, self.password = binaries, folder, port, password

    def url(self, database: str) -> str:
        """URL of a database, with the password."""
        return (
            f"postgresql://{USER}:{quote(self.password, safe='')}@127.0.0.1:{self.port}/{database}"
        )

    def is_told_by(self, content: bytes) -> bool:
        """Whether the password stands there, quoted or not."""
        ways = (self.password, quote(self.password, safe=""), self.password.split()[-1])
        return any(way.encode() in content for way in ways)

    def create(self, database: str) -> str:
        """Make an empty database; return its URL."""
        import psycopg2

        with contextlib.closing(psycopg2.connect(self.url("postgres"))) as session:
            session.autocommit = True
            with session.cursor() as cursor:
                cursor.execute(f"CREATE DATABASE {database}")
        return self.url(database)


@contextlib.contextmanager
def real_postgres() -> Iterator[Postgres]:
    """Start a server, and stop it. Without the package the test is skipped, or fails in CI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        say = pytest.fail if os.environ.get("ROMA_TEST_REQUIRE_ALL") else pytest.skip
        say("needs a real PostgreSQL (Debian's package postgresql)")
    binaries = found[-1].parent
    # not below tmp_path: as root, that is closed to everybody else
    folder = Path(tempfile.mkdtemp(prefix="roma-pg-"))
    try:
        yield from _serve(binaries, folder)
    finally:
        shutil.rmtree(folder)


def _serve(binaries: Path, folder: Path) -> Iterator[Postgres]:
    import psycopg2

    who: dict[str, Any] = {"cwd": "/"}
    if os.getuid() == 0:
        who |= {"user": "nobody", "extra_groups": []}
        shutil.chown(folder, "nobody")
    password = f"p@ss/word %41 {secrets.token_hex(4)}"
    file = folder / "password"
    file.write_text(password)
    if os.getuid() == 0:
        shutil.chown(file, "nobody")
    data = folder / "data"
    subprocess.run(
        [
            *(binaries / "initdb", "-D", data, "-U", USER, "--pwfile", file),
            *("--auth", "scram-sha-256", "--no-sync", "-E", "UTF8", "--locale", "C"),
        ],
        check=True,
        capture_output=True,
        **who,
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    options += " -c fsync=off -c max_connections=60 -c shared_buffers=16MB"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, *options.split()], stdout=log, stderr=log, **who
        )
    postgres = Postgres(binaries, folder, port, password)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg2.connect(postgres.url("postgres")).close()
                break
            except psycopg2.OperationalError:
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
        yield postgres
    finally:
        server.send_signal(signal.SIGINT)  # fast: does not wait for clients to leave
        server.wait(20)
