"""A stand-in for Comet's server, on the loopback interface.

    with FakeComet() as server:
        ...  # COMET_URL_OVERRIDE=server.url, COMET_API_KEY=anything
    server.metrics, server.params, server.images, ...

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


class FakeComet:
    """The server. Its attributes may be changed while it runs.

    `delay`: seconds before each answer. `fail`: {end of a path: status to answer with};
    the end "" is that of all paths. `bad_key`: say of any key that it is unknown.
    Leaving the `with` block cuts all connections, so that it doubles as an outage.
    """

    def __init__(self, port=0, bad_key=False, delay=0.0, fail=None):
        self.bad_key, self.delay, self.fail = bad_key, delay, fail or {}
        self.lock = threading.Lock()
        self.connections = []
        self.experiments = set()  # their keys
        self.requests = []  # (method, path, query, body: what the JSON says)
        self.metrics = []  # dicts: metricName, metricValue, step, epoch, timestamp
        self.params = []  # dicts: parameterName, parameterValue, step
        self.others = {}  # the name of the experiment is others["Name"]
        self.graphs = []
        self.uploads = []  # dicts: path, query, filename, data
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

        self.httpd = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.httpd.daemon_threads = True
        self.port = self.httpd.server_address[1]
        self.root = f"http://127.0.0.1:{self.port}/"
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

    def metric(self, name):
        """Return [(step, value), ...] as received."""
        found = (m for m in self.metrics if m["metricName"] == name)
        return [(m.get("step"), float(m["metricValue"])) for m in found]

    @property
    def images(self):
        """Return [(name, step, data), ...] as received."""
        end = "visualizations/upload"
        found = (u for u in self.uploads if u["path"].endswith(end))
        return [
            (u["query"]["figName"], int(u["query"]["step"]), u["data"]) for u in found
        ]

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
        files, body = [], None
        kind = headers.get("Content-Type", "")
        if kind.startswith("multipart/form-data"):
            files = read_multipart(kind, raw)
        elif raw:
            with contextlib.suppress(ValueError):
                body = json.loads(raw)
        with self.lock:
            self.requests.append((handler.command, path, query, body))
            status, reply = self.take(path, query, body, files)
        reply = json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(reply)))
        handler.end_headers()
        handler.wfile.write(reply)

    def take(self, path, query, body, files):
        """Keep what a request brings; return the answer, a status and a dict."""
        for end, status in self.fail.items():
            if path.endswith(end):
                return status, {"msg": "forced failure", "sdk_error_code": 0}
        body = body if isinstance(body, dict) else {}
        if self.bad_key and path.startswith("/api/rest/"):
            return 401, {"msg": "Invalid API key", "sdk_error_code": 0}
        if path.endswith(("/logger/add/run", "/logger/get/run")):
            key = body.get("experimentKey") or body.get("previousExperiment")
            if self.bad_key:
                message, code = "API key is not registered", 90212
                return 400, {"msg": message, "sdk_error_code": code}
            new = path.endswith("/add/run") and not body.get("getOrCreateEnabled")
            if new and key in self.experiments:
                message, code = "experiment exists already", 90999
                return 400, {"msg": message, "sdk_error_code": code}
            self.experiments.add(key)
            return 200, self.describe_run()
        if path.endswith("/isAlive/ver"):
            return 200, {"version": "4.99.0"}
        if path.endswith("/status-report/update"):
            return 200, {
                "is_alive_beat_duration_millis": 10000,
                "gpu_monitor_interval_millis": 60000,
                "cpu_monitor_interval_millis": 60000,
                "parameter_update_interval_millis": 1000,
                "pending_rpcs": False,
            }
        if path.endswith("/get-pending-rpcs"):
            return 200, {"remoteProcedureCalls": []}
        if path.endswith("/experiment/metadata"):
            key = query.get("experimentKey")
            if key not in self.experiments:
                return 404, {"msg": "no such experiment", "sdk_error_code": 0}
            names = {"workspaceName": "workspace", "projectName": "project"}
            return 200, {"experimentKey": key, "throttle": False, **names}
        if path.endswith("/batch/logger/experiment/metric"):
            self.metrics += body.get("values", [])
        elif path.endswith("/batch/logger/experiment/parameter"):
            self.params += body.get("values", [])
        elif path.endswith("/write/experiment/log-other"):
            self.others[body.get("key")] = body.get("value")
        elif path.endswith("/write/experiment/graph"):
            self.graphs.append(body)
        elif path.endswith("/upload"):
            self.uploads += [{"path": path, "query": query, **file} for file in files]
            return 200, {"imageId": query.get("imageId"), "link": self.root}
        return 200, {"code": 200, "msg": "ok"}

    def describe_run(self):
        """Return what Comet tells of a new experiment."""
        return {
            "runId": "run-1",
            "project_id": "project-1",
            "githubEnabled": False,
            "focusUrl": self.root + "workspace/project/",
            "lastOffset": 0,
            "name": "a_name",
            "upload_file_size_limit_in_mb": 500,
            "asset_upload_file_size_limit_in_mb": 500,
            "featureToggles": [],
            "cometWebAssetUrl": self.root + "asset/",
            "cometWebImageUrl": self.root + "image/",
            "cometRestApiAssetUrl": self.root + "asset/",
            "cometRestApiImageUrl": self.root + "image/",
            "s3DirectAccessEnabled": False,
        }


def read_chunks(file):
    """Return the body of a request with Transfer-Encoding: chunked."""
    body = b""
    while size := int(file.readline().split(b";")[0], 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return body


def read_multipart(kind, raw):
    """Return the files in a body of type multipart/form-data."""
    head = b"Content-Type: " + kind.encode() + b"\r\n\r\n"
    parts = BytesParser(policy=HTTP).parsebytes(head + raw).iter_parts()
    return [
        {"filename": part.get_filename(), "data": part.get_payload(decode=True)}
        for part in parts
    ]
