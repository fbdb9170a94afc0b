"""What served when the run's date began, and whether it can still be judged."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from freshrank.features.encoder import Encoder
from freshrank.schema import Schema
from freshrank.serving.repository import ModelRepository

if TYPE_CHECKING:
    from freshrank.pipeline.run import Run


@dataclass(frozen=True)
class Champion:
    """The model that was served when the run's date began."""

    version: int
    run_date: str
    fingerprint: str
    bundle: Path
    lacking: tuple[str, ...] = ()
    """Inputs it needs that today's schema does not give: it cannot be judged, popularity stands in."""

    def __str__(self) -> str:
        name = f"version {self.version} of {self.run_date}"
        return f"popularity ({name} needs {', '.join(self.lacking)})" if self.lacking else name


def champion(run: "Run") -> Champion | None:
    """The served version, or the newest one of an earlier date when the run's own (or a later) date already serves."""
    repository = ModelRepository(run.workspace.triton)
    pointer = repository.served()
    if pointer and pointer.run_date < run.date.isoformat():
        return _champion(run, repository, pointer.version)
    if pointer is None:
        return None
    earlier = [v for v in repository.versions() if repository.info(v).run_date < run.date.isoformat()]
    dated = sorted(earlier, key=lambda v: (repository.info(v).run_date, v))
    return _champion(run, repository, dated[-1]) if dated else None


def _champion(run: "Run", repository: ModelRepository, version: int) -> Champion:
    info, bundle = repository.info(version), repository.version_directory(version)
    lacking = lacking_inputs(Encoder.load(bundle).schema, run.dataset.schema)
    return Champion(version, info.run_date, info.fingerprint, bundle, tuple(lacking))


def lacking_inputs(needed: Schema, given: Schema) -> list[str]:
    """Features of ``needed`` that ``given`` lacks or shapes otherwise; the actions too, which must be the same."""
    present = {feature.name: (feature.kind, feature.dim) for feature in given.features()}
    names = [f.name for f in needed.features() if present.get(f.name) != (f.kind, f.dim)]
    return names if needed.actions == given.actions else ["actions", *names]
