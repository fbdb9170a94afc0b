"""One code per string id for all imports under a workspace's name."""

from freshrank.datasets.dataset import Dataset
from freshrank.errors import ConfigError
from freshrank.storage.files import read_json, write_json
from freshrank.storage.workspace import Workspace


def bind(workspace: Workspace, dataset: Dataset) -> None:
    """Hold ``workspace`` to one code per string id, over all imports.

    Features, models and the online store speak codes. A second directory whose strings were mapped anew would read
    and serve other items' features under the same name, so it is refused.

    Raises:
        ConfigError: the dataset's mappings contradict those this workspace has seen.
    """
    known = read_json(workspace.bindings) if workspace.bindings.exists() else {}
    changed = {
        column: entry
        for column, entry in dataset.manifest.get("mappings", {}).items()
        if known.get(column, {}).get("sha256") != entry["sha256"]
    }
    for column in set(changed) & set(known):
        if dataset.mapping_digest(column, known[column]["rows"]) != known[column]["digest"]:
            raise ConfigError(
                f"{dataset.path}: '{column}' has other codes for its strings than the dataset '{workspace.dataset}' "
                f"that the workspace {workspace.home} knows. Import over the same directory to keep the codes, give "
                "schema.yaml another name, or set FRESHRANK_HOME to another workspace"
            )
    if changed:
        digests = {c: e | {"digest": dataset.mapping_digest(c, e["rows"])} for c, e in changed.items()}
        write_json(workspace.bindings, known | digests)
