"""An S3 server (moto) in a separate process, behind a proxy that can be slow and fail."""

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

BUCKET = "pose"
SECRET = "wJalrXUtnFEMIexampleSECRETkey"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLEKEYID",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Proxy(ThreadingHTTPServer):
    """Forwards requests to a server on this machine.

    latency_s: before each answer. bytes_per_s: of each answer; 0: no limit. faults: part of a path
    -> what happens to the next requests of it: "503", "403", "cut" (after half of the body) or
    "drop" (no answer). is_dead: all requests are dropped. log: methods and paths.
    """

    daemon_threads = True

    def __init__(self, server_port: int, latency_s: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_port_behind, self.latency_s, self.bytes_per_s = server_port, latency_s, 0.0
        self.faults: dict[str, list[str]] = {}
        self.is_dead = False
        self.log: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def reset(self) -> None:
        self.latency_s, self.bytes_per_s, self.is_dead = 0.0, 0.0, False
        self.faults.clear()
        self.log.clear()

    def fault_of(self, path: str) -> str:
        for part, faults in self.faults.items():
            if part in path and faults:
                return faults.pop(0)
        return "drop" if self.is_dead else ""

    def gets(self, part: str = "") -> list[str]:
        """The paths of the log that were fetched."""
        return [line[4:] for line in self.log if line.startswith("GET ") and part in line]

    def handle_error(self, request, client_address) -> None:
        """Do not print errors of clients that have disconnected."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        body, fault = self._body(), self.server.fault_of(self.path)
        time.sleep(self.server.latency_s)
        if fault == "drop":
            self.close_connection = True
            return
        if fault in ("503", "403"):
            code = {"503": "ServiceUnavailable", "403": "AccessDenied"}[fault]
            self._answer(int(fault), {}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.server_port_behind)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _OF_A_CONNECTION}
        behind.request(self.command, self.path, body, headers)
        answer = behind.getresponse()
        data = answer.read()
        behind.close()
        self._answer(answer.status, dict(answer.getheaders()), data, cut=fault == "cut")

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _OF_A_CONNECTION:
                self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(data))))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        step = 1 << 16 if self.server.bytes_per_s else len(data) or 1
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            if self.server.bytes_per_s:
                time.sleep(step / self.server.bytes_per_s)

    def log_message(self, *arguments) -> None:
        """Nothing is printed."""


_OF_A_CONNECTION = {"connection", "transfer-encoding", "content-length", "server", "date"}


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """A server with the bucket BUCKET; yields the proxy before it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        urlopen(Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")).close()
        with Proxy(port) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            yield proxy
            proxy.shutdown()
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise RuntimeError("moto.server did not start")
