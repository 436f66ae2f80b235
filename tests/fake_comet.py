"""A stand-in for Comet's server, on the loopback interface.

    with FakeComet() as server:
        ...  # COMET_URL_OVERRIDE=server.url, COMET_API_KEY=anything
    server.metrics, server.params, server.images, ...  # as in offline.Archive

comet-ml 3.58 takes it for Comet. What it receives it keeps, in memory.
"""

import contextlib
import json
import socket
import threading
import time
import zlib
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

ABOUT = {  # whatever is asked
    "version": "4.99.0",
    "runId": "run-1",
    "project_id": "project-1",
    "upload_file_size_limit_in_mb": 500,
    "featureToggles": [],
    "is_alive_beat_duration_millis": 10000,
    "remoteProcedureCalls": [],
    "gpu_monitor_interval_millis": 60000,
    "cpu_monitor_interval_millis": 60000,
    "parameter_update_interval_millis": 1000,
    "pending_rpcs": False,
    "workspaceName": "workspace",
    "projectName": "project",
}


class FakeComet:
    """The server. Its attributes may be changed while it runs.

    `delay`: seconds before each answer. `bad_key`: say of any key that it is unknown.
    `busy`: ask for a new try in ten minutes, always.
    Leaving the `with` block cuts all connections, so that it doubles as an outage.
    """

    def __init__(self, bad_key=False, delay=0.0, busy=False):
        self.bad_key, self.delay, self.busy = bad_key, delay, busy
        self.lock = threading.Lock()
        self.connections = []
        self.experiments = set()  # their keys
        self.requests = []  # (path, what the JSON says)
        self.metrics = {}  # name: [(step, epoch, value), ...]
        self.params, self.images, self.files = {}, {}, {}
        self.name = self.graph = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def setup(self):
                super().setup()
                outer.connections.append(self.connection)

            def finish(self):
                with contextlib.suppress(OSError):
                    super().finish()

            def answer(self):
                with contextlib.suppress(ConnectionError):
                    outer.handle(self)

            do_GET = do_POST = do_PUT = do_DELETE = answer

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.httpd.server_port}/"
        self.url = self.root + "clientlib/"  # for COMET_URL_OVERRIDE

    def __enter__(self):
        serve = self.httpd.serve_forever
        threading.Thread(target=serve, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *details):
        self.httpd.shutdown()
        self.httpd.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle(self, handler):
        """Read one request, keep it, and answer it."""
        headers = handler.headers
        if "chunked" in headers.get("Transfer-Encoding", ""):
            raw = read_chunks(handler.rfile)
        else:
            raw = handler.rfile.read(int(headers.get("Content-Length") or 0))
        if headers.get("Content-Encoding"):
            raw = zlib.decompress(raw, wbits=47)  # gzip or deflate
        url = urlsplit(handler.path)
        path = "/" + "/".join(part for part in url.path.split("/") if part)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        time.sleep(self.delay)
        files, body = [], {}
        kind = headers.get("Content-Type", "")
        if kind.startswith("multipart/form-data"):
            files = read_multipart(kind, raw)
        elif raw:
            with contextlib.suppress(ValueError):
                body = json.loads(raw)
        with self.lock:
            self.requests.append((path, body))
            status, reply = self.take(path, query, body, files)
        reply = json.dumps(reply).encode()
        handler.send_response(503 if self.busy else status)
        handler.send_header("Retry-After", "600")
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(reply)))
        handler.end_headers()
        handler.wfile.write(reply)

    def take(self, path, query, body, files):
        """Keep what a request brings; return the answer, a status and a dict."""
        if path.endswith(("/logger/add/run", "/logger/get/run")):
            key = body.get("experimentKey") or body.get("previousExperiment")
            new = path.endswith("/add/run") and not body.get("getOrCreateEnabled")
            if self.bad_key:
                return 400, {"msg": "no such API key", "sdk_error_code": 90212}
            if new and key in self.experiments:
                return 400, {"msg": "it exists already", "sdk_error_code": 90999}
            self.experiments.add(key)
            return 200, ABOUT | {"focusUrl": self.root + "workspace/project/"}
        if path.endswith("/batch/logger/experiment/metric"):
            for m in body["values"]:
                entry = m.get("step"), m.get("epoch"), float(m["metricValue"])
                self.metrics.setdefault(m["metricName"], []).append(entry)
        elif path.endswith("/batch/logger/experiment/parameter"):
            for p in body["values"]:
                self.params[p["parameterName"]] = p["parameterValue"]
        elif path.endswith("/write/experiment/log-other") and body["key"] == "Name":
            self.name = body["value"]
        elif path.endswith("/write/experiment/graph"):
            self.graph = body["graph"]
        elif path.endswith("/visualizations/upload"):
            self.images[query["figName"]] = files[0]
        elif path.endswith("/upload"):
            self.files[query.get("fileName", path.split("/")[-2])] = files[0]
        return 200, ABOUT | {"imageId": query.get("imageId"), "link": self.root}


def read_chunks(file):
    """Return the body of a request with Transfer-Encoding: chunked."""
    body = b""
    while size := int(file.readline().split(b";")[0], 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return body


def read_multipart(kind, raw):
    """Return the contents of the files in a body of type multipart/form-data."""
    head = b"Content-Type: " + kind.encode() + b"\r\n\r\n"
    parts = BytesParser(policy=HTTP).parsebytes(head + raw).iter_parts()
    return [part.get_payload(decode=True) for part in parts]
