"""Run the pipeline on this machine: every step a subprocess of this interpreter, no container, no cluster."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TextIO

from freshrank.config import RunConfig
from freshrank.errors import PipelineFailed
from freshrank.orchestration.kubeflow.arguments import PipelineBuilder, arguments, outcome
from freshrank.settings import settings

KEPT_RUNS = 5
LOG = "pipeline.log"
TAIL_LINES = 20

_COLOUR = re.compile(r"\x1b\[\d+m")
_STEP = re.compile(r"Executing task '([^']+)'")
_STEP_END = re.compile(r"^\S+ - (?:INFO|ERROR) - Task '", re.MULTILINE)
_OWN_ERROR = re.compile(r"^\s*freshrank\.errors\.(?=\w+: )", re.MULTILINE)


def run_pipeline(
    build: PipelineBuilder,
    data: Path,
    run_date: date,
    config: RunConfig,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run the pipeline for ``run_date`` and return its :func:`~freshrank.orchestration.kubeflow.arguments.outcome`.

    The steps' output is kept in ``kfp/<run>/pipeline.log`` of the workspace, with the artifacts of the last five
    runs. It is streamed to stdout as well, unless ``progress`` is given, which is told each step's name as it starts.
    Raises PipelineFailed with the step that failed and its own error.
    """
    from kfp import local

    parameters = arguments(data, run_date, config)
    root = _new_root(settings().home / "kfp", run_date)
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
    with _logged_to(root / LOG, progress):
        try:
            build()(**parameters)
        except RuntimeError as error:
            raise PipelineFailed(explain(root / LOG)) from error
    return outcome(data, parameters["run_date"])


def _new_root(parent: Path, run_date: date) -> Path:
    """A new directory for one run; of the earlier ones the latest ``KEPT_RUNS - 1`` stay."""
    root = parent / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-for-{run_date.isoformat()}"
    root.mkdir(parents=True)
    for old in sorted(parent.glob("*-for-*"))[:-KEPT_RUNS]:
        shutil.rmtree(old, ignore_errors=True)
    return root


class _Tee:
    """Text goes to ``copy``, and to ``stream`` or ``progress``; what else a stream can do is asked of ``stream``."""

    def __init__(self, stream: TextIO, copy: TextIO, progress: Callable[[str], None] | None) -> None:
        self._stream = stream
        self._copy = copy
        self._progress = progress

    def write(self, text: str) -> int:
        plain = _COLOUR.sub("", text)
        self._copy.write(plain)
        if self._progress is None:
            return self._stream.write(text)
        for step in _STEP.findall(plain):
            self._progress(step)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _logged_to(path: Path, progress: Callable[[str], None] | None) -> Iterator[None]:
    with path.open("w", buffering=1) as copy, redirect_stdout(_Tee(sys.stdout, copy, progress)):  # type: ignore[type-var]
        yield


def explain(log: Path) -> str:
    """Which step failed and why: freshrank's own error where the step raised one, else the last lines of its log."""
    _, *steps = _STEP.split(log.read_text())
    if not steps:
        return f"the pipeline failed before its first step; the whole log: {log}"
    name, text = steps[-2:]
    return f"step '{name}' failed\n{_reason(_STEP_END.split(text)[0])}\nThe whole log: {log}"


def _reason(step_log: str) -> str:
    own = list(_OWN_ERROR.finditer(step_log))
    text = step_log[own[-1].end() :] if own else "\n".join(step_log.rstrip().splitlines()[-TAIL_LINES:])
    return "\n".join(line.removeprefix(" " * 4).rstrip() for line in text.strip().splitlines())
