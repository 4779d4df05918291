"""A plain HTTP server of pictures by one SD3 model and several adapters.

    python -m examples.server PIPELINE [--adapter NAME=FOLDER ...] [--device cuda]
    curl localhost:8000/generate -d '{"prompt": "a fox", "adapter": "NAME", "seed": 1}' -o fox.png

`GET /state` says how much there is to do, `GET /adapters` which adapters are served. Errors are one
line of JSON. Whoever closes the connection is no longer worked for. It knows no users and no
encryption: put what does before it.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import select
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

import shiva_dit
from examples.batching import UNPRUNED, Batcher, BusyError, Request

logger = logging.getLogger("server")
LOOK = 0.1
"""Seconds between looks whether a client is still there."""
MAX_BODY = 1 << 16
"""Bytes of a request."""
FIELDS: dict[str, tuple[Any, Any, Any, Any]] = {
    "prompt": (str, None, 1, 4000),
    "negative_prompt": (str, "", 0, 4000),
    "adapter": (str, UNPRUNED, 1, 200),
    "height": (int, 512, 1, 1 << 14),
    "width": (int, 512, 1, 1 << 14),
    "steps": (int, 28, 1, 200),
    "guidance": (float, 4.5, 0.0, 50.0),
    "seed": (int, 0, 0, (1 << 63) - 1),
}
"""Type, default (None: must be there), and bounds, of a text's length or a number."""


def read_request(body: bytes) -> Request:
    """What somebody wants.

    Raises:
        ValueError: One line that says what is wrong.
    """
    try:
        given = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body isn't JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError('the body must be a JSON object, such as {"prompt": "a fox"}.')
    unknown = sorted(set(given) - set(FIELDS))
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; known are {', '.join(FIELDS)}.")
    values: dict[str, Any] = {}
    for name, (kind, default, least, most) in FIELDS.items():
        value = given.get(name, default)
        if value is None:
            raise ValueError(f"{name} is missing.")
        if kind is float and type(value) is int:
            value = float(value)
        size = len(value) if isinstance(value, str) else value
        if type(value) is not kind or not least <= size <= most:
            what = "a text of" if kind is str else f"{kind.__name__} of"
            raise ValueError(f"{name} must be {what} {least} to {most}, got {value!r:.50}.")
        values[name] = value
    return Request(**values)


class Server(ThreadingHTTPServer):
    """A thread for each connection; the batcher's thread alone runs the model."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], batcher: Batcher) -> None:
        self.batcher = batcher
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a client that sends nothing
    server: Server

    def do_GET(self) -> None:
        """What the server does and has."""
        batcher = self.server.batcher
        if self.path == "/state":
            self._answer(200, batcher.state())
        elif self.path == "/adapters":
            self._answer(200, {"adapters": list(batcher.served)})
        else:
            self._fail(404, f"there is no {self.path}; GET /state, /adapters or POST /generate.")

    def do_POST(self) -> None:
        """A picture."""
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > MAX_BODY:
            self.close_connection = True  # what follows isn't read
            return self._fail(413, f"Content-Length must be there, up to {MAX_BODY} bytes.")
        body = self.rfile.read(int(size))
        if self.path != "/generate":
            return self._fail(404, f"there is no {self.path}: POST to /generate.")
        try:
            request = self.server.batcher.submit(read_request(body))
        except ValueError as error:
            return self._fail(400, str(error))
        except BusyError as error:
            return self._fail(503, str(error))
        while not request.done.wait(LOOK):
            if self._is_gone():
                request.dropped = self.close_connection = True
                return None
        if isinstance(request.error, BusyError):
            return self._fail(503, str(request.error))
        if request.picture is None:
            return self._fail(500, f"{type(request.error).__name__}: {request.error}")
        file = io.BytesIO()
        request.picture.save(file, format="PNG")
        return self._send(200, "image/png", file.getvalue())

    def _is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            poller = select.poll()  # `select` knows 1,024 connections at most
            poller.register(self.connection, select.POLLIN)
            return bool(poller.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _fail(self, status: int, error: str) -> None:
        self._answer(status, {"error": " ".join(error.split())})

    def _answer(self, status: int, said: dict[str, Any]) -> None:
        self._send(status, "application/json", (json.dumps(said) + "\n").encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status == 503:
                self.send_header("Retry-After", "1")
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # it went away meanwhile
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """As the rest of the program logs."""
        logger.info("%s " + format, self.address_string(), *args)


def main() -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pipeline", help="folder or Hub id of a Stable Diffusion 3 pipeline")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    defaults = Batcher.__init__.__kwdefaults__ or {}
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        adapters = {}
        for each in asked.adapter:
            name, _, folder = each.partition("=")
            if not name or not folder:
                raise ValueError(f"--adapter takes NAME=FOLDER, got {each!r}.")
            adapters[name] = shiva_dit.ShivaAdapter.from_pretrained(folder)
        dtype = getattr(torch, asked.dtype)
        pipe = StableDiffusion3Pipeline.from_pretrained(asked.pipeline, torch_dtype=dtype)
        batcher = Batcher(
            pipe.to(asked.device), **{name: getattr(asked, name) for name in defaults}
        )
        for name, adapter in adapters.items():
            batcher.add(name, adapter)
        server = Server((asked.host, asked.port), batcher)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"server: {error}\n")
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    logger.info(
        "serving on http://%s:%d: %s", *server.server_address[:2], ", ".join(batcher.served)
    )
    server.serve_forever(poll_interval=LOOK)
    batcher.close()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
