"""Who may load and unload models: whoever holds the token of the server.

Triton answers control and inference on the same ports; a header is what tells them apart. `freshrank serve` draws a
token for each start and leaves it, readable by its own user only, in the model repository; where the environment sets
FRESHRANK_TRITON_CONTROL_TOKEN, that is the token. Triton takes it as an argument only, so its command line shows it.
"""

import os
import secrets
from pathlib import Path

from freshrank.settings import settings
from freshrank.storage.files import atomic_write

HEADER = "x-freshrank-control"
GRPC_HEADER = f"triton-grpc-protocol-{HEADER}"
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
_PROTECTIONS = ("http-restricted-api", "grpc-restricted-protocol")


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
