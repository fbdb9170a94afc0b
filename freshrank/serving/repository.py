"""Triton's model repository on disk: installed versions, the served one, and the configs rendered from both.

<root>/models/ranker/{config.pbtxt,<version>/}     one directory per installed bundle
<root>/models/ranking/{config.pbtxt,1/}            the model that clients call; it reads the pointer at every request
<root>/served.json                                 the pointer: which version of ranker is served
<root>/rejected/<version>.json                     what was wrong with versions that never served

The pointer is the only state: config.pbtxt is derived from it, so switching and rolling back are one rename.
"""

import logging
import py_compile
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Literal, Self

from google.protobuf import json_format, text_format  # type: ignore[import-untyped]
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from pydantic import BaseModel, ConfigDict
from tritonclient.grpc.model_config_pb2 import ModelConfig

from freshrank.bundle.format import BundleInfo, Signature, TensorSpec, check_bundle, read_info, read_signature
from freshrank.errors import ServingError
from freshrank.serving.cpu import usable_cores
from freshrank.serving.experiment import ExperimentFile
from freshrank.serving.protocol import INPUTS, MAX_BATCH, OPTIONAL, OUTPUTS, RANKING
from freshrank.settings import settings
from freshrank.storage.files import atomic_directory, locked, read_json, write_json, write_text

RANKER = "ranker"
TEMPLATES = Path(str(files("freshrank.triton_models")))

log = logging.getLogger(__name__)
_COMPILED = shutil.ignore_patterns("__pycache__")

Platform = Literal["python", "onnxruntime"]


class Pointer(BaseModel):
    """Which installed version answers, and which one a rollback returns to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    previous: int | None = None
    rolled_back_from: int | None = None
    run_date: str
    fingerprint: str

    @property
    def live(self) -> list[int]:
        """Versions that stay loaded."""
        return sorted({self.version, *([self.previous] if self.previous else [])})


class ModelRepository:
    """The model repository under ``root``; whoever changes it holds :meth:`lock`."""

    def __init__(self, root: Path, platform: Platform = "python", threads: int = 0) -> None:
        """``threads`` per ranker version; 0 is one per core."""
        self.root = root.resolve()
        self.models = self.root / "models"
        self.pointer_path = self.root / "served.json"
        self.platform = platform
        self.threads = threads

    @property
    def project(self) -> str:
        """Name of the schema whose models are served: clients refuse a server of another project."""
        return self.root.name

    @contextmanager
    def lock(self) -> Iterator[Self]:
        """Wait until no other process publishes, rolls back or starts a server here; a killed holder frees it."""
        with locked(self.root / "lock"):
            yield self

    def version_directory(self, version: int) -> Path:
        return self.models / RANKER / str(version)

    def versions(self) -> list[int]:
        """Installed versions, ascending."""
        return sorted(int(entry.name) for entry in (self.models / RANKER).glob("*") if entry.name.isdigit())

    def info(self, version: int) -> BundleInfo:
        return read_info(self.version_directory(version))

    def signature(self, version: int) -> Signature:
        return read_signature(self.version_directory(version))

    def install_version(self, bundle: Path) -> int:
        """Copy ``bundle`` in and return its version; a fingerprint already installed keeps its version."""
        info = check_bundle(bundle)
        for leftover in (self.models / RANKER).glob(".*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for version in self.versions():
            if self.info(version).fingerprint == info.fingerprint:
                return version
        version = self._next_version()
        self.place_version(bundle, version)
        return version

    def place_version(self, bundle: Path, version: int) -> None:
        """Copy ``bundle`` in as ``version``, replacing what is installed under that number."""
        with atomic_directory(self.version_directory(version)) as directory:
            shutil.copytree(bundle, directory, dirs_exist_ok=True)
            _place_code(RANKER, directory, self.version_directory(version))

    def refresh_code(self, versions: Collection[int]) -> None:
        """Give ``versions`` that an earlier release installed the code of this one: theirs imports what that release
        had. To be called before a server loads them, for it would load again what changes afterwards."""
        for directory in map(self.version_directory, versions):
            if not _has_code(RANKER, directory):
                with atomic_directory(directory) as refreshed:
                    shutil.copytree(directory, refreshed, dirs_exist_ok=True, ignore=_COMPILED)
                    _place_code(RANKER, refreshed, directory)
                log.info("%s: the code of an earlier release is replaced", directory)

    def reject(self, version: int, reason: str) -> None:
        """Remove a version that never served; its number is not given again and ``reason`` is kept."""
        note = {"fingerprint": self.info(version).fingerprint, "reason": reason}
        write_json(self.root / "rejected" / f"{version}.json", note)
        shutil.rmtree(self.version_directory(version))

    def prune(self, keep: int) -> list[int]:
        """Remove the oldest versions beyond ``keep``, never a live one; return what was removed."""
        live = self.live()
        doomed = [version for version in self.versions()[:-keep] if version not in live]
        for version in doomed:
            shutil.rmtree(self.version_directory(version))
        return doomed

    def served(self) -> Pointer | None:
        """The pointer, None before the first publication; ServingError where it cannot be read."""
        try:
            return Pointer.model_validate(read_json(self.pointer_path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = str(error).replace("\n", " ")
            raise ServingError(
                f"{self.pointer_path} cannot be read: {reason}; mend or restore it, or remove it and "
                "publish again: servers that run go on with what it said last"
            ) from error

    def live(self) -> list[int]:
        """Versions that stay loaded and installed: those of the pointer, and of the experiment that runs.

        ServingError where the experiment cannot be read: what it needs must not be unloaded or pruned meanwhile.
        """
        pointer, experiment = self.served(), ExperimentFile(self.root).read_anew()
        wanted = {*(pointer.live if pointer else []), *(experiment.versions if experiment else [])}
        return sorted(wanted & set(self.versions()))

    def _loadable(self, pointer: Pointer) -> list[int]:
        """As :meth:`live`; a server starts without an experiment that cannot be read rather than not at all."""
        try:
            return self.live()
        except ServingError as error:
            log.warning("%s", error)
            return pointer.live

    def point_to(self, pointer: Pointer) -> list[str]:
        """Serve ``pointer.version`` from the next request on; return the models a server should have loaded."""
        # A server that restarts between these writes finds the version of either pointer in its config.
        self.expect(pointer)
        write_json(self.pointer_path, pointer.model_dump(mode="json"))
        return self.write_configs()

    def expect(self, pointer: Pointer) -> None:
        """Have a server that starts from now on load what ``pointer`` will need, beside what is needed now."""
        self._write_ranker_config({*pointer.live, *self.live()})

    def expect_no_more(self) -> None:
        """Undo :meth:`expect`."""
        if self.served():
            self.write_configs()
        else:
            (self.models / RANKER / "config.pbtxt").unlink(missing_ok=True)

    def ranker_config(self, versions: Collection[int]) -> str:
        """``config.pbtxt`` of ranker with exactly ``versions`` loaded.

        Versions may differ in signature: their inputs are united, and one that not all of them take is optional.
        """
        signatures = [self.signature(version) for version in versions]
        inputs = _united([signature.inputs for signature in signatures])
        everywhere = set.intersection(*({spec.name for spec in signature.inputs} for signature in signatures))
        return _render(
            RANKER,
            versions=sorted(versions),
            inputs=inputs,
            outputs=_united([signature.outputs for signature in signatures]),
            optional={spec.name for spec in inputs} - everywhere,
            platform=self.platform,
            threads=self.threads,
        )

    def ranker_config_json(self, versions: Collection[int]) -> str:
        """The same as :meth:`ranker_config`, as the model control API takes it."""
        return str(json_format.MessageToJson(text_format.Parse(self.ranker_config(versions), ModelConfig())))

    def write_configs(self) -> list[str]:
        """Bring every config.pbtxt in line with the pointer, and all code with this release; return the models a server
        loads at its start."""
        self.refresh_code(self.versions())
        self._write_ranking()
        pointer = self.served()
        if pointer is None:
            return [RANKING]
        if pointer.version not in self.versions():
            raise ServingError(
                f"{self.pointer_path} serves version {pointer.version}, but only {self.versions()} are installed "
                f"in {self.models / RANKER}; restore it, or remove {self.pointer_path} and publish again"
            )
        self._write_ranker_config(self._loadable(pointer))
        return [RANKER, RANKING]

    def _write_ranker_config(self, versions: Collection[int]) -> None:
        installed = sorted(set(versions) & set(self.versions()))
        _write_changed(self.models / RANKER / "config.pbtxt", self.ranker_config(installed))

    def _write_ranking(self) -> None:
        code = self.models / RANKING / "1"
        if not _has_code(RANKING, code):
            with atomic_directory(code) as directory:
                _place_code(RANKING, directory, code)
        config = _render(
            RANKING,
            project=self.project,
            repository=self.root,
            inputs=INPUTS,
            outputs=OUTPUTS,
            optional=OPTIONAL,
            max_batch=MAX_BATCH,
            instances=settings().ranking_instances or max(1, usable_cores() // 2),
        )
        _write_changed(self.models / RANKING / "config.pbtxt", config)

    def _next_version(self) -> int:
        rejected = [int(path.stem) for path in (self.root / "rejected").glob("*.json")]
        return 1 + max([0, *self.versions(), *rejected])


def _place_code(model: str, directory: Path, final: Path) -> None:
    """Put the Python model into ``directory``, which will be named ``final``, and compile it.

    Triton would take the file that Python compiles at the first load for a changed version and load it again.
    """
    code = directory / "model.py"
    shutil.copyfile(TEMPLATES / model / "model.py", code)
    py_compile.compile(str(code), dfile=str(final / "model.py"), doraise=True)


def _has_code(model: str, directory: Path) -> bool:
    code = directory / "model.py"
    return code.exists() and code.read_bytes() == (TEMPLATES / model / "model.py").read_bytes()


def _united(groups: list[tuple[TensorSpec, ...]]) -> list[TensorSpec]:
    united: dict[str, TensorSpec] = {}
    for spec in (spec for group in groups for spec in group):
        united[spec.name] = _widened(united.get(spec.name, spec), spec)
    return list(united.values())


def _widened(left: TensorSpec, right: TensorSpec) -> TensorSpec:
    if left.dtype != right.dtype or len(left.shape) != len(right.shape):
        raise ServingError(
            f"tensor {left.name!r} is {left.dtype}{left.shape} in one loaded version and "
            f"{right.dtype}{right.shape} in another; give the changed tensor a new name"
        )
    shape = tuple(a if a == b else -1 for a, b in zip(left.shape, right.shape, strict=True))
    return left.model_copy(update={"shape": shape})


def _render(model: str, **values: object) -> str:
    loader = FileSystemLoader(TEMPLATES / model)
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=select_autoescape())
    return environment.get_template("config.pbtxt.j2").render(values)


def _write_changed(path: Path, text: str) -> None:
    # Triton reloads what has a newer modification time, so what did not change is not written.
    if path.exists() and path.read_text() == text:
        return
    write_text(path, text)
