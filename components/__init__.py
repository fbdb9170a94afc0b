"""The Kubeflow pipeline: what runs in which order, and the gate between judging and serving.

Importing it loads no kfp, so that whoever reads a DAG can name the pipeline.
"""

from collections.abc import Callable
from typing import Any


def build(place: Callable[[Any], object] | None = None) -> Any:
    """``train_ranker`` as a ``kfp`` component; ``place`` is called with every task, to say where it runs."""
    from freshrank.components import pipeline

    return pipeline.build(place or (lambda task: None))
