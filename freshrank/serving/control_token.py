"""Who may load and unload models: whoever holds the token of the server.

Triton answers control and inference on the same ports; a header is what tells them apart. `freshrank serve` draws a
token for each start and leaves it, readable by its own user only, in the model repository. Triton takes the token as
an argument, so it is blanked out of the process's command line once the server has read it.
"""

import logging
import os
import secrets
from pathlib import Path

from freshrank.settings import settings
from freshrank.storage.files import atomic_write

HEADER = "x-freshrank-control"
GRPC_HEADER = f"triton-grpc-protocol-{HEADER}"
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
_PROTECTIONS = ("http-restricted-api", "grpc-restricted-protocol")
# Of /proc/<pid>/stat, counted after the name in brackets: where the arguments lie in the process's memory.
_ARGUMENTS_START, _ARGUMENTS_END = 45, 46

log = logging.getLogger(__name__)


def token_path(root: Path) -> Path:
    """Where the server of the model repository ``root`` leaves its token, mode 0600."""
    return root / "control.token"


def token_of(root: Path) -> str:
    """What the server of ``root`` wants to see: the setting where there is one, else the file; empty without either."""
    given = settings().triton_control_token.get_secret_value()
    path = token_path(root)
    return given or (path.read_text() if path.exists() else "")


def renew_token(root: Path) -> str:
    """Draw a token for a server about to start, or take the setting's, and leave it in the file."""
    token = settings().triton_control_token.get_secret_value() or secrets.token_hex(24)
    with atomic_write(token_path(root)) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
    return token


def restrictions(token: str) -> list[str]:
    """Arguments of tritonserver that refuse control without ``token``, on both protocols."""
    return [f"--{flag}={','.join(RESTRICTED)}:{HEADER}={token}" for flag in _PROTECTIONS]


def conceal(pid: int, token: str) -> bool:
    """Blank ``token`` out of the command line of our process ``pid``, which must have read it; False where Linux
    does not let us."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[_ARGUMENTS_START]), int(fields[_ARGUMENTS_END])
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            memory.seek(start)
            memory.write(arguments.replace(token.encode(), b"*" * len(token)))
    except OSError as error:
        log.warning("the control token stays visible in the command line of process %d: %s", pid, error)
        return False
    return True
