"""The values for Airflow's own chart fit what this chart renders and what the image holds (that chart is not here)."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from freshrank.orchestration.kubeflow.placement import PUBLISHER_LABEL
from freshrank.orchestration.kubeflow.settings import _PROJECTED_TOKEN
from tests.helm.charts import CHART, Object, named, of_kind, rendered
from tests.helm.test_images import ROOT, ancestry, pinned, stages


def values() -> Object:
    return dict(yaml.safe_load((CHART / "airflow/values.yaml").read_text()))


COMPONENTS = ("scheduler", "triggerer", "dagProcessor", "apiServer")


def mounts(component: str) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in values()[component].get("extraVolumeMounts", [])}


def claims(component: str) -> list[str]:
    volumes = values()[component].get("extraVolumes", [])
    return [each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each]


def variables_of_the_image() -> str:
    return " ".join(stages()["airflow"].of("ENV"))


def test_airflow_reads_every_config_map_that_speaks_of_the_pipeline() -> None:
    """By the names under which the release has them."""
    read = [source["configMapRef"]["name"] for source in yaml.safe_load(values()["extraEnvFrom"])]
    assert read == ["freshrank-settings", "freshrank-pipeline"]
    assert set(read) <= {item["metadata"]["name"] for item in of_kind(rendered("default"), "ConfigMap")}


def test_what_runs_tasks_has_the_secrets_of_the_steps_by_reference() -> None:
    """The same keys of the same Secrets as the pipeline's pods; with LocalExecutor that is the scheduler."""
    references = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in values()["scheduler"]["env"]}
    given = {name: f"{each['name']}:{each['key']}" for name, each in references.items()}
    steps = named(rendered("default"), "ConfigMap", "freshrank-pipeline")["data"]["FRESHRANK_CLUSTER_SECRET_ENV"]
    assert given == json.loads(steps)


def test_no_other_pod_of_airflow_has_secrets_or_files_of_the_release() -> None:
    """Pages, parser of the DAGs and triggerer do without; nothing is given to all of them."""
    assert not {"secret", "env", "extraEnv", "volumes", "volumeMounts"} & values().keys()
    assert [component for component in COMPONENTS if values()[component].get("env")] == ["scheduler"]
    assert [component for component in COMPONENTS if claims(component)] == ["scheduler"]
    assert [component for component in COMPONENTS if "labels" in values()[component]] == ["scheduler"]


def test_keys_of_a_bucket_are_shown_as_the_release_names_them() -> None:
    """The commented lines are what the production scenario needs."""
    text = (CHART / "airflow/values.yaml").read_text()
    steps = named(rendered("production"), "ConfigMap", "freshrank-pipeline")["data"]["FRESHRANK_CLUSTER_SECRET_ENV"]
    for variable, reference in json.loads(steps).items():
        if variable.startswith("AWS"):
            secret, _, key = reference.partition(":")
            assert f"# - {{name: {variable}, valueFrom: {{secretKeyRef: {{name: {secret}, key: {key}}}}}}}" in text


def test_airflow_has_the_workspace_where_the_settings_say() -> None:
    """The claim of the release, at FRESHRANK_HOME, writable."""
    (claim,) = claims("scheduler")
    assert claim in {item["metadata"]["name"] for item in of_kind(rendered("default"), "PersistentVolumeClaim")}
    home = named(rendered("default"), "ConfigMap", "freshrank-settings")["data"]["FRESHRANK_HOME"]
    assert mounts("scheduler")["home"] == home
    (mount,) = [each for each in values()["scheduler"]["extraVolumeMounts"] if each["name"] == "home"]
    assert not mount.get("readOnly")


@pytest.mark.parametrize("component", ["scheduler", "triggerer"])
def test_the_token_for_kubeflow_is_where_its_client_looks(component: str) -> None:
    """A projected token that Kubernetes renews, no secret that someone copies."""
    (volume,) = [v for v in values()[component]["extraVolumes"] if v["name"] == "kubeflow-token"]
    (source,) = volume["projected"]["sources"]
    assert f"{mounts(component)['kubeflow-token']}/{source['serviceAccountToken']['path']}" == str(_PROJECTED_TOKEN)


def test_what_runs_tasks_may_reach_redis_and_triton() -> None:
    """It carries the label by which the network policies let publishers in."""
    assert values()["scheduler"]["labels"] == dict([PUBLISHER_LABEL])


def test_the_triggerer_waits_and_every_component_is_bounded() -> None:
    """The operator defers, so there must be one; CPU and memory have a request and a limit."""
    assert values()["triggerer"]["enabled"] is True
    for component in COMPONENTS:
        amounts = values()[component]["resources"]
        assert amounts["requests"].keys() == amounts["limits"].keys() == {"cpu", "memory"}


def test_airflow_runs_the_dags_of_its_image() -> None:
    """The folder of the image, no volume and no other checkout."""
    folder = values()["config"]["core"]["dags_folder"]
    assert f"AIRFLOW__CORE__DAGS_FOLDER={folder}" in variables_of_the_image()
    assert folder == "/opt/freshrank/dags"
    (step,) = [text for text in stages()["airflow"].of("RUN") if text.startswith("ln -s")]
    (program,) = re.findall(r'python -c \'(.*?)\'\)" dags$', step)
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"daily_retraining.py", "hourly_counters.py"} <= {path.name for path in Path(asked.stdout.strip()).iterdir()}
    assert [stage.of("WORKDIR") for stage in ancestry("airflow") if stage.of("WORKDIR")] == [["/opt/freshrank"]]
    assert not values()["dags"]["persistence"]["enabled"]
    assert not values()["dags"]["gitSync"]["enabled"]


def test_airflow_is_the_version_and_the_image_that_are_locked() -> None:
    """Repository and tag are what `make images` builds, the version what requirements/runtime.lock pins."""
    assert values()["airflowVersion"] == pinned("runtime.lock")["apache-airflow"]
    bake = (CHART / "images/docker-bake.hcl").read_text()
    assert 'tags     = ["${REGISTRY}/airflow:${VERSION}"]' in bake
    assert f'default = "{values()["defaultAirflowTag"]}"' in bake


def test_airflow_runs_as_the_owner_of_the_workspace() -> None:
    """User and group of every other pod."""
    assert (values()["uid"], values()["gid"]) == (1000, 1000)
    pod = values()["securityContexts"]["pod"]
    assert (pod["runAsNonRoot"], pod["runAsUser"], pod["fsGroup"]) == (True, 1000, 1000)
    assert values()["securityContexts"]["containers"]["capabilities"] == {"drop": ["ALL"]}


def test_what_airflow_is_told_to_import_is_installed() -> None:
    """Executor and auth manager need no package that the image lacks; its database needs one that only it has."""
    module, _, name = values()["config"]["core"]["auth_manager"].rpartition(".")
    imported: Any = __import__(module, fromlist=[name])
    assert hasattr(imported, name)
    assert values()["executor"] == "LocalExecutor"
    assert "apache-airflow-providers-postgres" in pinned("airflow.lock")


def test_no_secret_is_in_the_values() -> None:
    """Passwords, keys and the database's address are names of Secrets."""
    assert values()["data"] == {"metadataSecretName": "airflow-metadata"}
    for key in ("fernetKeySecretName", "apiSecretKeySecretName", "jwtSecretName"):
        assert values()[key] == "airflow-keys"
    assert not {"fernetKey", "apiSecretKey", "jwtSecret", "webserverSecretKey"} & values().keys()
