"""The Kubeflow pipeline as an Airflow operator, and which errors a retry can mend.

Importable without kfp and without the libraries of the steps: Airflow's triggerer and DAG processor load it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException

from freshrank.errors import ConfigError, ServingError
from freshrank.settings import settings

if TYPE_CHECKING:
    from airflow.sdk import Context

    from freshrank.config import RunConfig


@contextmanager
def final_errors() -> Iterator[None]:
    """Fail a task at once, without retries, on what only a person can mend: all but a server or file that is away."""
    try:
        yield
    except (ServingError, OSError):
        raise
    except Exception as error:
        raise AirflowFailException(f"{type(error).__name__}: {error}") from error


def data_directory(data: str) -> Path:
    """``data``, or the dataset named by the settings; one in an object store is brought into the workspace."""
    from freshrank.objects import local_dataset

    if chosen := data or settings().dataset:
        return local_dataset(chosen).resolve()
    raise ConfigError("data: neither the DAG's param 'data' nor FRESHRANK_DATASET names an imported data directory")


def run_config(recipe: str, overrides: list[str]) -> "RunConfig":
    """The named recipe (the default one if empty) with ``section.field=value`` overrides."""
    from freshrank import recipes

    return recipes.recipe(recipe or recipes.DEFAULT_RECIPE, overrides)


class KubeflowPipelineOperator(BaseOperator):
    """Run ``train_ranker`` where ``FRESHRANK_RUNNER`` says, wait for it and return the outcome."""

    template_fields: Sequence[str] = ("data", "run_date", "recipe", "overrides")

    def __init__(
        self,
        *,
        data: str,
        run_date: str,
        recipe: str = "",
        overrides: str = "[]",
        timeout: timedelta = timedelta(hours=12),
        **kwargs: Any,
    ) -> None:
        """``recipe`` is a name in :mod:`freshrank.recipes`, ``overrides`` a JSON list of ``section.field=value``."""
        super().__init__(**kwargs)
        self.data = data
        self.run_date = run_date
        self.recipe = recipe
        self.overrides = overrides
        self.timeout = timeout

    def execute(self, context: "Context") -> dict[str, Any]:
        from freshrank.clock import parse_day

        with final_errors():
            config = run_config(self.recipe, json.loads(self.overrides))
            data, run_date = data_directory(self.data), parse_day(self.run_date)
            result = self._run(data, run_date, config)
        self.log.info("verdict=%s reasons=%s", result["verdict"], result["reasons"])
        return result

    def _run(self, data: Path, run_date: date, config: "RunConfig") -> dict[str, Any]:
        if settings().runner == "local":
            from freshrank.orchestration.local import run_pipeline

            return run_pipeline(data, run_date, config)
        from freshrank.orchestration.cluster import run_on_cluster

        return run_on_cluster(data, run_date, config, self.timeout)
