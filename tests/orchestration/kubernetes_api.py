"""The few answers of a Kubernetes API that a TrainJob needs, over real HTTP, for the real client."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

NAMESPACE = "ranking"
JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
RUNNING: dict[str, Any] = {"jobsStatus": [{"name": "node", "active": 1, "ready": 1, "succeeded": 0, "failed": 0}]}
COMPLETE: dict[str, Any] = {"conditions": [{"type": "Complete", "status": "True", "reason": "JobsCompleted"}]}
FAILED: dict[str, Any] = {
    "conditions": [{"type": "Failed", "status": "True", "reason": "JobsFailed", "message": "jobset failed"}]
}


class KubernetesApi(ThreadingHTTPServer):
    """Holds TrainJobs; each look at one takes the next of ``states`` for its status, the last one again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.states: list[dict[str, Any]] = [{}, RUNNING, COMPLETE]
        self.created: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.refuse: dict[str, int] = {}
        """HTTP method -> the status that answers it."""
        self.unavailable = 0
        """How many of the next requests are answered 503."""
        self.vanish_after: int | None = None
        """After that many looks at a job it is gone."""
        self.on_create: Any = lambda job: None

    def kubeconfig(self, path: Path) -> Path:
        """A kubeconfig of this server at ``path``."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def looked_at(self, job: dict[str, Any]) -> dict[str, Any] | None:
        if self.vanish_after is not None:
            self.vanish_after -= 1
            if self.vanish_after < 0:
                return None
        status = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return job | {"status": status}


class _Handler(BaseHTTPRequestHandler):
    server: KubernetesApi

    def _is_turned_away(self) -> bool:
        if self.server.unavailable > 0:
            self.server.unavailable -= 1
            self._answer(503, {"message": "overloaded"})
            return True
        if self.command in self.server.refuse:
            self._answer(self.server.refuse[self.command], {"message": "the server says no"})
            return True
        return False

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_turned_away():
            return
        name = job["metadata"]["name"]
        assert self.path == JOBS
        if name in self.server.jobs:
            self._answer(409, {"message": "exists"})
            return
        self.server.jobs[name] = job
        self.server.created.append(job)
        self.server.on_create(job)
        self._answer(201, job)

    def do_GET(self) -> None:
        if self._is_turned_away():
            return
        url = urlsplit(self.path)
        if url.path == PODS:
            assert "jobset.sigs.k8s.io/jobset-name=" in parse_qs(url.query)["labelSelector"][0]
            pods = [
                {"metadata": {"name": f"node-{n}"}, "status": {"phase": phase}}
                for n, phase in enumerate(("Running", "Failed"))
            ]
            self._answer(200, {"kind": "PodList", "items": pods})
        elif url.path == f"{PODS}/node-1/log":
            self._text(200, "CUDA out of memory")
        else:
            known = self.server.jobs.get(url.path.rpartition("/")[2])
            resource = None if known is None else self.server.looked_at(known)
            self._answer(200 if resource else 404, resource or {"message": "not found"})

    def do_DELETE(self) -> None:
        if self._is_turned_away():
            return
        name = urlsplit(self.path).path.rpartition("/")[2]
        known = self.server.jobs.pop(name, None)
        if known:
            self.server.deleted.append(name)
        self._answer(200 if known else 404, {"kind": "Status", "message": "gone"})

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        self._text(code, json.dumps(body))

    def _text(self, code: int, body: str) -> None:
        payload = body.encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def kubernetes_api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
