"""The control channel: a rank asks, in one line, for another rate or for the bytes on the wire, and gets a JSON line.

Requests are `rate 100mbit`, `rate 100mbit 2` (of rank 2 alone), `rate` (which one holds?) and `bytes`; answers
`{"rate": "100mbit"}`, `{"bytes_sent": [1200, 900]}` or `{"error": "..."}`. Network namespaces do not part unix sockets
that have a path.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "SLOW_LINK_CONTROL"
_LONGEST_REQUEST = 1000  # bytes
_TIMEOUT_S = 30.0


class ControlError(RuntimeError):
    """A request was refused, or nobody answers."""


class Control:
    """What a rank under slow_link holds to change the network that it runs in.

    All links change for all ranks, so let one rank ask while the others wait at a barrier. Each request is a
    connection of its own: threads and forks may share an object.
    """

    def __init__(self, path: str):
        self.path = path

    @classmethod
    def from_environment(cls) -> Control | None:
        """Return the control of the network that this process runs in; None if it is not under slow_link."""
        path = os.environ.get(VARIABLE)
        return cls(path) if path else None

    def request(self, line: str) -> dict[str, Any]:
        """Return the answer to a one-line request. Raises ControlError."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_TIMEOUT_S)
                connection.connect(self.path)
                connection.sendall(line.encode() + b"\n")
                answer = json.loads(connection.makefile().readline())
        except (OSError, ValueError, RecursionError) as exc:
            raise ControlError(f"no answer from slow_link at {self.path} ({exc})") from exc
        if not isinstance(answer, dict):
            raise ControlError(f"no answer from slow_link at {self.path} but {answer!a:.60}")
        if "error" in answer:
            raise ControlError(answer["error"])
        return answer

    def _told(self, line: str, name: str, kind: type) -> Any:
        answer = self.request(line)
        if not isinstance(answer.get(name), kind):
            raise ControlError(f"no {name} from slow_link at {self.path} but {answer!a:.60}")
        return answer[name]

    def rate(self) -> str:
        """Return the rate of every link, such as 50mbit; where these differ, that of each one, with commas between.

        A link is that of one rank, or of all ranks of a node.
        """
        return self._told("rate", "rate", str)

    def set_rate(self, rate: str, rank: int | None = None) -> None:
        """Give every link, or that of one rank and its node, a rate (100mbit, 'unlimited'). Raises ControlError."""
        self.request(f"rate {rate}" if rank is None else f"rate {rate} {rank}")

    def bytes_sent(self) -> list[int]:
        """Return how many bytes have been put on the wire so far, link by link: by a rank, or by a node's ranks."""
        return self._told("bytes", "bytes_sent", list)


class ControlServer:
    """Answers requests on a unix socket at `path`, in threads, until it is closed."""

    def __init__(self, path: Path, answer: Callable[[str], dict[str, Any]]):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):  # who asked may be gone
                    _serve(self, answer)

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

        self._server = Server(str(path), Handler)
        poll = {"poll_interval": 0.05}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=poll, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _serve(stream: socketserver.StreamRequestHandler, answer: Callable[[str], dict[str, Any]]) -> None:
    while line := stream.rfile.readline(_LONGEST_REQUEST + 1):
        whole = len(line) <= _LONGEST_REQUEST
        try:
            if not whole:
                raise ValueError(f"a request has at most {_LONGEST_REQUEST} bytes")
            reply = answer(line.decode(errors="replace"))
        except Exception as exc:  # whatever a request does, the network stays up and says so
            reply = {"error": f"{exc}" or type(exc).__name__}
        stream.wfile.write(json.dumps(reply).encode() + b"\n")
        if not whole:
            return
