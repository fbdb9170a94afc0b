"""A local server that speaks the Kubeflow Pipelines API v2beta1 as far as freshrank uses it.

Requests are read into, and answers written from, the models of the real client (``kfp_server_api``): a field that
the API does not have is refused, as its own server refuses it. It also has what Kubeflow's pages read logs from.
"""

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml

CODEC = api.ApiClient()
FINISHED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}


def read(kind: str, body: bytes) -> Any:
    """``body`` as a model of the client; ValueError on a field that it does not have."""
    raw, model = json.loads(body), getattr(api, kind)
    if unknown := set(raw) - set(model.attribute_map.values()):
        raise ValueError(f"unknown fields {sorted(unknown)} of {kind}")
    return CODEC.deserialize(SimpleNamespace(data=json.dumps(raw)), kind)


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose ``METHOD path`` matches, after ``skip`` that do not suffer."""

    pattern: str
    status: int = 0
    times: int = 1
    reset: bool = False
    """The connection ends without an answer."""
    after: bool = False
    """The request is carried out first: only its answer is lost."""
    hang: bool = False
    """Until the server is closed."""
    page: str = ""
    """Answered with 200, as a log-in page is."""
    headers: dict[str, str] = field(default_factory=dict)


class KfpServer(ThreadingHTTPServer):
    """Keeps pipelines, versions, experiments and runs in memory; tests move the runs on and inject faults."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.RLock()
        self.pipelines: list[Any] = []
        self.versions: list[Any] = []
        self.packages: list[str] = []
        """What was uploaded, as it came."""
        self.experiments: list[Any] = []
        self.runs: list[Any] = []
        self.terminated: list[str] = []
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.hanging = 0
        """How many requests are not answered until ``closed``."""
        self.closed = threading.Event()
        self.tokens: set[str] | None = None
        self.logs: dict[str, str] = {}
        self.before_creating: Callable[[], object] = lambda: None
        self.script: list[dict[str, Any]] = []
        """What the next reads of a run find, one after the other; the last one stays."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """What tells freshrank to use this server, with little patience."""
        return {
            "FRESHRANK_KFP_HOST": self.url,
            "FRESHRANK_KFP_RETRY_SECONDS": "5",
            "FRESHRANK_KFP_REQUEST_SECONDS": "5",
            "FRESHRANK_KFP_SETTLE_SECONDS": "0.3",
        }

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(re.fullmatch(pattern, request) is not None for request in self.requests)

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def fail(self, run_id: str, step: str, pod: str, message: str = "") -> None:
        """End the run as Kubeflow reports it: the step's graph, its pod's node and the root have failed."""
        now = datetime.now(UTC)
        error = api.GoogleRpcStatus(code=2, message=message) if message else None
        details = [
            api.V2beta1PipelineTaskDetail(display_name="root", state="FAILED", end_time=now + timedelta(seconds=2)),
            api.V2beta1PipelineTaskDetail(display_name="root-driver", state="SUCCEEDED", end_time=now),
            api.V2beta1PipelineTaskDetail(display_name="executor", state="FAILED", end_time=now),
            api.V2beta1PipelineTaskDetail(
                display_name=step,
                state="FAILED",
                end_time=now + timedelta(seconds=1),
                error=error,
                child_tasks=[api.PipelineTaskDetailChildTask(pod_name=pod)],
            ),
        ]
        self.run(run_id).run_details = api.V2beta1RunDetails(task_details=details)
        self.run(run_id).state = "FAILED"

    def run(self, run_id: str) -> Any:
        return _one(run for run in self.runs if run.run_id == run_id)

    def created(self, run: Any) -> Any:
        version = _one(v for v in self.versions if v.pipeline_version_id == _reference(run)["pipeline_version_id"])
        inputs = set(version.pipeline_spec["root"]["inputDefinitions"]["parameters"])
        given = set(run.runtime_config.parameters)
        if inputs != given:
            raise ValueError(f"parameters {sorted(inputs ^ given)} of the pipeline and of the run differ")
        _one(e for e in self.experiments if e.experiment_id == run.experiment_id)
        self.before_creating()
        with self.lock:
            run.run_id = f"run-{len(self.runs)}"
            run.state = "PENDING"
            # The server's own resolution: runs of the same second have equal times.
            run.created_at = datetime.now(UTC).replace(microsecond=0)
            self.runs.append(run)
        return run

    def terminate(self, run_id: str) -> None:
        run = self.run(run_id)
        if run.state in FINISHED:
            raise ValueError(f"run {run_id} has ended")
        run.state = "CANCELING"
        self.terminated.append(run_id)

    def seen(self, run_id: str) -> Any:
        run = self.run(run_id)
        if self.script:
            change = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            for name, value in change.items():
                setattr(run, name, value)
        if run.state == "CANCELING" and self.count(f"GET .*/runs/{run_id}") % 2 == 0:
            run.state = "CANCELED"
        return run


class _NotFound(Exception):
    pass


def _one(items: Iterator[Any]) -> Any:
    for each in items:
        return each
    raise _NotFound("no such object")


def _reference(run: Any) -> dict[str, str]:
    reference = run.pipeline_version_reference
    return {name: str(getattr(reference, name)) for name in ("pipeline_id", "pipeline_version_id")}


class _Taken(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    server: KfpServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        self.url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(self.url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {self.url.path}"
        self.server.requests.append(request)
        fault = self.server.fault_for(request)
        if fault is not None and not fault.after:
            return self._suffer(fault)
        status, body = self._served()
        return self._suffer(fault) if fault is not None else self._answer(status, body)

    def _served(self) -> tuple[int, Any]:
        allowed = self.server.tokens
        if allowed is not None and self.headers.get("authorization", "").removeprefix("Bearer ") not in allowed:
            return 401, {"error": "Unauthenticated", "code": 16, "message": "the token is not valid"}
        try:
            return 200, self._route()
        except _NotFound as error:
            return 404, {"error": str(error), "code": 5, "message": str(error)}
        except _Taken as error:
            return 409, {"error": str(error), "code": 6, "message": str(error)}
        except (ValueError, TypeError, KeyError) as error:
            return 400, {"error": str(error), "code": 3, "message": f"{type(error).__name__}: {error}"}

    def _suffer(self, fault: Fault) -> None:
        if fault.hang:
            with self.server.lock:
                self.server.hanging += 1
            self.server.closed.wait()
        if fault.reset or fault.hang:
            self.close_connection = True
            self.connection.close()
            return
        self._answer(fault.status or 200, fault.page or {"message": "told to"}, fault.headers)

    def _route(self) -> Any:
        for pattern, serve in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.url.path}"):
                return serve(self, *match.groups())
        raise _NotFound(f"no {self.command} {self.url.path} in this API")

    def _named(self, objects: list[Any]) -> list[Any]:
        predicates = json.loads(self.query["filter"])["predicates"]
        (name,) = (each["string_value"] for each in predicates if each["operation"] == "EQUALS")
        return [each for each in objects if each.display_name == name]

    def list_pipelines(self) -> Any:
        return api.V2beta1ListPipelinesResponse(pipelines=self._named(self.server.pipelines) or None)

    def create_pipeline(self) -> Any:
        return self._add(read("V2beta1Pipeline", self.body), self.server.pipelines, "pipeline_id")

    def list_versions(self, pipeline_id: str) -> Any:
        of_pipeline = [each for each in self.server.versions if each.pipeline_id == pipeline_id]
        return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=self._named(of_pipeline) or None)

    def upload_version(self) -> Any:
        pipeline = _one(each for each in self.server.pipelines if each.pipeline_id == self.query["pipelineid"])
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        (part,) = message_from_bytes(head + self.body).get_payload()
        package = part.get_payload(decode=True).decode()
        self.server.packages.append(package)
        spec, *_ = yaml.safe_load_all(package)
        version = api.V2beta1PipelineVersion(
            pipeline_id=pipeline.pipeline_id, display_name=self.query["name"], pipeline_spec=spec
        )
        return self._add(version, self.server.versions, "pipeline_version_id")

    def list_experiments(self) -> Any:
        return api.V2beta1ListExperimentsResponse(experiments=self._named(self.server.experiments) or None)

    def create_experiment(self) -> Any:
        return self._add(read("V2beta1Experiment", self.body), self.server.experiments, "experiment_id")

    def list_runs(self) -> Any:
        newest_first = self._named(list(reversed(self.server.runs)))
        return api.V2beta1ListRunsResponse(runs=newest_first or None)

    def create_run(self) -> Any:
        return self.server.created(read("V2beta1Run", self.body))

    def get_run(self, run_id: str) -> Any:
        return self.server.seen(run_id)

    def terminate_run(self, run_id: str) -> Any:
        self.server.terminate(run_id)
        return {}

    def pod_log(self) -> str:
        if self.query["podname"] not in self.server.logs:
            raise _NotFound("pod not found")
        return self.server.logs[self.query["podname"]]

    def _add(self, made: Any, to: list[Any], identity: str) -> Any:
        with self.server.lock:
            if any(each.display_name == made.display_name for each in to):
                raise _Taken(f"{made.display_name} already exists")
            setattr(made, identity, f"{identity}-{len(to)}")
            to.append(made)
        return made

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        text = isinstance(body, str)
        payload = body.encode() if text else json.dumps(CODEC.sanitize_for_serialization(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if text else "application/json")
        self.send_header("Content-Length", str(len(payload)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


_V2 = "/apis/v2beta1"
ROUTES: list[tuple[str, Callable[..., Any]]] = [
    (f"GET {_V2}/pipelines", _Handler.list_pipelines),
    (f"POST {_V2}/pipelines", _Handler.create_pipeline),
    (f"GET {_V2}/pipelines/([^/]+)/versions", _Handler.list_versions),
    (f"POST {_V2}/pipelines/upload_version", _Handler.upload_version),
    (f"GET {_V2}/experiments", _Handler.list_experiments),
    (f"POST {_V2}/experiments", _Handler.create_experiment),
    (f"GET {_V2}/runs", _Handler.list_runs),
    (f"POST {_V2}/runs", _Handler.create_run),
    (f"GET {_V2}/runs/([^/:]+)", _Handler.get_run),
    (f"POST {_V2}/runs/([^/:]+):terminate", _Handler.terminate_run),
    ("GET /k8s/pod/logs", _Handler.pod_log),
]


@contextmanager
def serving() -> Iterator[KfpServer]:
    """The server on a free port of loopback."""
    with KfpServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.closed.set()
        server.shutdown()


def speaking_tls(server: KfpServer, folder: Path) -> Path:
    """Let ``server`` speak TLS for 127.0.0.1, by a certificate that it signed itself: the file with it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    certificate = builder.add_extension(alternative, critical=True).sign(key, hashes.SHA256())
    pem, whole = folder / "authority.pem", folder / "server.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    whole.write_bytes(pem.read_bytes() + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(whole)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return pem
