"""An S3 server on loopback for tests, and a proxy before it that breaks requests on command.

The server is moto's, in a process of its own. With FLASHU_TEST_S3_ENDPOINT set, tests use that server instead (MinIO,
say) with the credentials of the environment. A folder's conftest.py imports the fixtures that its tests use.
"""

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import boto3
import pytest

GIVEN = "FLASHU_TEST_S3_ENDPOINT"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Bucket:
    """A fresh bucket on a server."""

    name: str
    endpoint_url: str

    @property
    def url(self):
        return f"s3://{self.name}"


@dataclass(frozen=True)
class S3Server:
    endpoint_url: str
    is_moto: bool = False

    @cached_property
    def client(self):
        return boto3.session.Session().client("s3", endpoint_url=self.endpoint_url)

    def new_bucket(self):
        name = f"flashu-test-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return Bucket(name, self.endpoint_url)


@contextmanager
def moto_server(**environment):
    """Moto's server on a free port, gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; from moto.server import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}", process)
        yield S3Server(f"http://127.0.0.1:{port}", is_moto=True)
    finally:
        process.kill()
        process.wait()


def _wait_until_up(url, process, patience_s=60):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(patience_s * 10):
        if process.poll() is not None:
            raise RuntimeError(f"moto's server stopped with exit code {process.returncode}")
        try:
            opener.open(f"{url}/moto-api/", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"moto's server did not answer in {patience_s} s")


@dataclass(frozen=True)
class Answer:
    """A fault: the server answers with an error of S3, and does nothing."""

    status: int
    code: str
    extra: str = ""  # further XML elements


INTERNAL_ERROR = Answer(500, "InternalError")
UNAVAILABLE = Answer(503, "ServiceUnavailable")
DROP = "drop"  # close the connection without an answer, before anything is done
LOSE_ANSWER = "lose the answer"  # do it, then close the connection
BREAK_OFF = "break off"  # send half of the answer's body, then close; without a body, the same as to lose the answer


@dataclass(frozen=True)
class Request:
    """What the proxy saw: `path` is decoded and without the query, `fault` what it did to it."""

    method: str
    path: str
    query: str
    fault: object = None


@dataclass
class FaultProxy:
    """Passes requests on to `upstream`, logs them, and breaks some while `inject` is in force.

    Use it as a context manager. Requests keep their Host header, so signatures stay valid.
    """

    upstream: str
    seed: int = 0
    log: list[Request] = field(default_factory=list)

    def __post_init__(self):
        self._random, self._lock = random.Random(self.seed), threading.Lock()
        self.heal()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def inject(self, *faults, probability=1.0, times=None, methods=None, path_end=""):
        """From now on break requests with one of these faults: so many at most, of these methods and paths only."""
        with self._lock:
            self._faults, self._probability, self._methods, self._path_end = faults, probability, methods, path_end
            self._left = float("inf") if times is None else times

    def heal(self):
        self.inject(probability=0)

    def requests(self, method, ending=""):
        return [request for request in self.log if request.method == method and request.path.endswith(ending)]

    def draw(self, method, target):
        """Choose what becomes of a request, and log it."""
        with self._lock:
            fault = None
            path, _, query = target.partition("?")
            path = unquote(path)
            concerned = (self._methods is None or method in self._methods) and path.endswith(self._path_end)
            if self._faults and self._left > 0 and concerned and self._random.random() < self._probability:
                fault = self._random.choice(self._faults)
                self._left -= 1
            self.log.append(Request(method, path, query, fault))
            return fault


def _handler(proxy):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def log_message(self, *_):
            pass

        def handle_any(self):
            body = self._request_body()
            fault = proxy.draw(self.command, self.path)
            if fault == DROP:
                self._close()
            elif isinstance(fault, Answer):
                self._send(fault.status, [("Content-Type", "application/xml")], _error_body(fault))
            else:
                status, headers, answer = self._forward(body)
                if fault == LOSE_ANSWER or (fault == BREAK_OFF and not answer):
                    self._close()
                else:
                    self._send(status, headers, answer, broken=fault == BREAK_OFF)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

        def _request_body(self):
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return body

        def _forward(self, body):
            connection = http.client.HTTPConnection(urlsplit(proxy.upstream).netloc, timeout=60)
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("connection", "expect", "transfer-encoding", "content-length")
            }
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            return answer.status, answer.getheaders(), data

        def _send(self, status, headers, body, broken=False):
            self.send_response_only(status)
            length = str(len(body))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if broken else body)
            if broken:
                self._close()

        def _close(self):
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


def _error_body(fault):
    return (
        f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{fault.code}</Code>"
        f"<Message>injected by the test</Message>{fault.extra}<RequestId>test</RequestId></Error>"
    ).encode()


@pytest.fixture(scope="session")
def s3_server():
    """The server for all tests of a session."""
    if os.environ.get(GIVEN):
        yield S3Server(os.environ[GIVEN])
    else:
        with moto_server() as server:
            yield server


@pytest.fixture
def s3_environment(monkeypatch, tmp_path_factory):
    """None of the user's own AWS settings, no HTTP proxy on the way; processes that a test starts inherit it."""
    set_s3_environment(monkeypatch, tmp_path_factory)


def set_s3_environment(monkeypatch, tmp_path_factory):
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
    if not os.environ.get(GIVEN):
        nowhere = tmp_path_factory.mktemp("aws")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(nowhere / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nowhere / "credentials"))
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTINGTESTING00")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing/secret+key")


@pytest.fixture
def bucket(s3_server, s3_environment):
    """A new bucket; read its `url` and `endpoint_url`."""
    return s3_server.new_bucket()


@pytest.fixture
def fault_proxy(bucket):
    """A proxy before the server of `bucket`."""
    with FaultProxy(bucket.endpoint_url) as proxy:
        yield proxy
