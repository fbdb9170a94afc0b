"""Where the steps of a compiled pipeline run: images, resources, GPUs, secrets, volumes."""

import json
import logging
from collections.abc import Callable
from typing import Any

from freshrank.orchestration.kubeflow.settings import ClusterSettings, secret_reference, step_environment
from freshrank.settings import settings

log = logging.getLogger(__name__)
PUBLISHER_LABEL = ("freshrank/publisher", "true")
"""The chart's network policies let only pods with this label publish to Triton and write to the online store."""

_TRAINING_TASK = "train"
_DETERMINISTIC_TASK = "validate-data"


def placement(cluster: ClusterSettings) -> Callable[[Any], None]:
    """How each task is placed: image, settings, secrets by reference, volume; the training step's node and GPU."""
    secrets = [(variable, *secret_reference(variable, value)) for variable, value in cluster.secret_env.items()]

    def place(task: Any) -> None:
        from kfp import kubernetes

        if cluster.image:
            task.set_container_image(cluster.image)
        kubernetes.add_pod_label(task, *PUBLISHER_LABEL)
        for name, value in step_environment().items():
            task.set_env_variable(name, value)
        for variable, secret, key in secrets:
            kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env={key: variable})
        if cluster.home_claim:
            kubernetes.mount_pvc(task, pvc_name=cluster.home_claim, mount_path=str(settings().home))
        if task.name == _TRAINING_TASK and not cluster.train_nodes:
            _place_training(task, cluster)
        else:
            _ask(
                task,
                cluster.step_cpu_request,
                cluster.step_cpu_limit,
                cluster.step_memory_request,
                cluster.step_memory_limit,
            )
        if task.name == _TRAINING_TASK and cluster.train_nodes:
            _hand_on(task, cluster)
        if task.name != _DETERMINISTIC_TASK:
            task.set_retry(cluster.retries, backoff_duration="60s", backoff_factor=2.0)

    return place


def _ask(task: Any, cpu_request: str, cpu_limit: str, memory_request: str, memory_limit: str) -> None:
    asked = [
        (task.set_cpu_request, cpu_request),
        (task.set_cpu_limit, cpu_limit),
        (task.set_memory_request, memory_request),
        (task.set_memory_limit, memory_limit),
    ]
    for ask, quantity in asked:
        if quantity:
            ask(quantity)


def _place_training(task: Any, cluster: ClusterSettings) -> None:
    from kfp import kubernetes

    if cluster.gpus:
        task.set_accelerator_type(cluster.gpu_resource).set_accelerator_limit(cluster.gpus)
    _ask(task, cluster.cpu, cluster.cpu, cluster.memory, cluster.memory)
    for label, value in cluster.node_selector.items():
        kubernetes.add_node_selector(task, label, value)


def _hand_on(task: Any, cluster: ClusterSettings) -> None:
    """To the step that starts a TrainJob: what the nodes get."""
    for name, value in cluster.model_dump().items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        task.set_env_variable(f"FRESHRANK_CLUSTER_{name.upper()}", text)
