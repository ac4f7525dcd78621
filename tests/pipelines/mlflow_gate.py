"""A gate in front of a real MLflow server, which can be shut like a dead or a hanging server."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal


class Gate:
    """Passes connections to 127.0.0.1:``port`` on, from an address that stays the same.

    ``dead`` refuses connections and resets those that are open, as a killed server does; ``hanging``
    accepts connections and never answers; ``late`` never answers either, but keeps what was asked
    until ``deliver`` hands it to the server.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self.kept: list[bytes] = []
        self._listen(0)
        self.address = f"http://127.0.0.1:{self._own_port}"
        self.state: Literal["open", "dead", "hanging", "late"] = "open"

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self._own_port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def become(self, state: Literal["open", "dead", "hanging", "late"]) -> None:
        with self._lock:
            was, self.state = self.state, state
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._open.clear()
            if state == "dead" != was:
                self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
            elif was == "dead" != state:
                self._listen(self._own_port)

    def _keep(self, client: socket.socket) -> None:
        """Take a request until the client gives up."""
        asked = b""
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                asked += data
        self.kept.append(asked)

    def deliver(self) -> None:
        while self.kept:
            with socket.create_connection(("127.0.0.1", self.port)) as server:
                server.sendall(self.kept.pop(0))
                server.recv(65536)

    def close(self) -> None:
        self.become("dead")

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.append(client)
                if self.state == "late":
                    threading.Thread(target=self._keep, args=(client,), daemon=True).start()
                if self.state != "open":
                    continue
                server = socket.create_connection(("127.0.0.1", self.port))
                self._open.append(server)
            for pair in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
