#!/opt/venv/bin/python
"""tritonserver of the image: the wheel's binary with its libraries and backends, and the arguments given.

``--assemble``, while the image is built, links the Python backend together in a folder that need not be writable later.
"""

import os
import sys
from pathlib import Path

from freshrank.serving.deploy.local_server import STUB_ENVIRONMENT, Wheel

BACKENDS = Path(os.environ.get("TRITON_BACKENDS", "/opt/triton/backends"))


def main(arguments: list[str]) -> None:
    wheel = Wheel.find()
    if arguments == ["--assemble"]:
        BACKENDS.parent.mkdir(parents=True, exist_ok=True)
        wheel.assemble_backends(BACKENDS)
        return
    ours = [f"--backend-directory={BACKENDS}", "--allow-gpu-metrics=false"]
    # In the place of this process, so that it receives the signals of Kubernetes.
    environment = wheel.environment() | STUB_ENVIRONMENT
    os.execve(wheel.binary, [str(wheel.binary), *ours, *arguments], environment)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
