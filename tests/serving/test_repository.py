"""The model repository on disk, without a server."""

from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tiny_bundles import SIGNATURE, expected, request, write_bundle
from tritonclient.grpc.model_config_pb2 import ModelConfig

from freshrank.bundle.golden import GoldenCase, enlarged
from freshrank.errors import ServingError
from freshrank.serving.repository import TEMPLATES, ModelRepository, Platform, Pointer
from freshrank.storage.files import write_json


def config_of(repository: ModelRepository, versions: list[int]) -> ModelConfig:
    return text_format.Parse(repository.ranker_config(versions), ModelConfig())


@pytest.mark.parametrize(
    ("platform", "file"), [("python", "model.py"), ("onnxruntime", "ranker.onnx")], ids=["local", "cluster"]
)
def test_one_template_renders_both_platforms(tmp_path: Path, platform: Platform, file: str) -> None:
    """Only the backend, its file and its thread parameter differ; both files are in every version."""
    repository = ModelRepository(tmp_path / "triton", platform)
    version = repository.install_version(write_bundle(tmp_path / "bundle", 1.0))
    config = config_of(repository, [version])
    assert (config.backend, config.default_model_filename, config.max_batch_size) == (platform, file, 0)
    assert [(i.name, list(i.dims)) for i in config.input] == [(s["name"], s["shape"]) for s in SIGNATURE["inputs"]]
    assert list(config.version_policy.specific.versions) == [version]
    assert (repository.version_directory(version) / file).is_file()


def test_ranking_carries_the_project_that_it_serves(tmp_path: Path) -> None:
    """The name of the repository's root, which is the schema's: clients compare it with their own."""
    repository = ModelRepository(tmp_path / "my_log")
    repository.write_configs()
    text = (repository.models / "ranking" / "config.pbtxt").read_text()
    assert text_format.Parse(text, ModelConfig()).parameters["project"].string_value == "my_log"


def test_versions_grow_and_a_fingerprint_keeps_its_own(tmp_path: Path) -> None:
    """Three bundles, the first one twice, are versions 1, 2 and 3."""
    repository = ModelRepository(tmp_path / "triton")
    bundles = [write_bundle(tmp_path / f"b{weight}", weight) for weight in (1.0, 2.0, 3.0)]
    assert [repository.install_version(bundle) for bundle in [*bundles, bundles[0]]] == [1, 2, 3, 1]
    assert (repository.version_directory(1) / "encoder.json").exists()


def test_only_versions_with_the_code_of_another_release_are_written_anew(tmp_path: Path) -> None:
    """Triton loads again what has changed: what has not must keep its files, compiled ones included."""
    repository = ModelRepository(tmp_path / "triton")
    for weight in (1.0, 2.0):
        repository.install_version(write_bundle(tmp_path / f"b{weight}", weight))
    before = {number: files_of(repository.version_directory(number)) for number in (1, 2)}
    (repository.version_directory(1) / "model.py").write_text("import freshrank.serving.golden\n")
    repository.write_configs()
    after = {number: files_of(repository.version_directory(number)) for number in (1, 2)}
    assert after[2] == before[2]
    assert after[1].keys() == before[1].keys()
    assert (repository.version_directory(1) / "model.py").read_text() == (TEMPLATES / "ranker/model.py").read_text()
    assert not list((repository.models / "ranker").glob(".*"))


def files_of(directory: Path) -> dict[str, tuple[int, int]]:
    """Which file, and when it was written last, by its name."""
    found = {path: path.stat() for path in directory.rglob("*")}
    return {str(path.relative_to(directory)): (state.st_ino, state.st_mtime_ns) for path, state in found.items()}


def test_pruning_spares_what_is_live(tmp_path: Path) -> None:
    """A version rolled back to stays, however old it is."""
    repository = ModelRepository(tmp_path / "triton")
    for weight in (1.0, 2.0, 3.0, 4.0):
        repository.install_version(write_bundle(tmp_path / f"b{weight}", weight))
    repository.point_to(Pointer(version=2, previous=1, run_date="2022-05-01", fingerprint="w2.0"))
    assert repository.prune(keep=1) == [3]
    assert repository.versions() == [1, 2, 4]


def test_a_tensor_may_not_change_its_type_between_loaded_versions(tmp_path: Path) -> None:
    """Two versions of one model share a config, so the error asks for a new name."""
    repository = ModelRepository(tmp_path / "triton")
    bundle = write_bundle(tmp_path / "old", 1.0)
    repository.install_version(bundle)
    repository.install_version(write_bundle(tmp_path / "new", 2.0))
    changed = [spec | ({"dtype": "float32"} if spec["name"] == "user_index" else {}) for spec in SIGNATURE["inputs"]]
    write_json(repository.version_directory(2) / "signature.json", SIGNATURE | {"inputs": changed})
    with pytest.raises(ServingError, match=r"'user_index' is int64.*float32.*give the changed tensor a new name"):
        repository.ranker_config([1, 2])


def test_a_pointer_to_a_version_that_is_gone_is_explained(tmp_path: Path) -> None:
    """A half-copied workspace is named as such instead of starting a server that serves nothing."""
    repository = ModelRepository(tmp_path / "triton")
    repository.install_version(write_bundle(tmp_path / "bundle", 1.0))
    write_json(repository.pointer_path, {"version": 7, "run_date": "2022-05-01", "fingerprint": "x"})
    with pytest.raises(ServingError, match=r"serves version 7, but only \[1\] are installed"):
        repository.write_configs()


def test_an_enlarged_golden_case_repeats_candidates_and_leaves_the_user() -> None:
    """3 candidates made 5: the first two come again, with their answers."""
    inputs = request(3)
    case = GoldenCase(inputs, expected(inputs, 2.0))
    larger = enlarged(case, 5)
    assert larger
    assert larger.inputs["user_vector"].shape == (1, 2)
    assert larger.inputs["item_vector"].tolist() == inputs["item_vector"][[0, 1, 2, 0, 1]].tolist()
    assert abs(larger.outputs["score"] - expected(larger.inputs, 2.0)["score"]).max() < 1e-6
    smaller = enlarged(case, 1)
    assert smaller
    assert smaller.inputs["item_vector"].shape == (1, 2)


def test_a_case_that_does_not_tell_candidates_from_users_is_not_enlarged() -> None:
    """With a single candidate, or with several users, a leading dimension says nothing."""
    one = request(1)
    assert enlarged(GoldenCase(one, expected(one, 1.0)), 5) is None
    two_users = request(3) | {"user_vector": np.zeros((2, 2), np.float32)}
    assert enlarged(GoldenCase(two_users, {}), 5) is None
