"""Whole requests that a version answers through `ranking` before it serves."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ranking_world import RankingWorld

from freshrank.errors import ServingError
from freshrank.serving.client.client import Client
from freshrank.serving.deploy.publish import publish
from freshrank.serving.probe_requests import MOST_RECORDED, record, recorded_path, warm_up_requests
from freshrank.serving.triton import TritonClient
from freshrank.settings import settings
from freshrank.storage.files import read_json, write_json


def unseen(world: RankingWorld, name: str) -> Path:
    """A copy of the served bundle that counts as another version."""
    copy = world.home / name
    shutil.copytree(world.bundle(seed=0), copy)
    write_json(copy / "bundle.json", read_json(copy / "bundle.json") | {"fingerprint": name})
    return copy


@pytest.fixture
def recorded(world: RankingWorld) -> Iterator[Path]:
    path = recorded_path(world.workspace.requests)
    yield path
    path.unlink(missing_ok=True)


def test_without_a_recording_nobody_asks_for_items_without_history(tmp_path: Path) -> None:
    """Small ones: a request of 2,000 candidates would hold up those of clients. Ids that no import gives."""
    requests = warm_up_requests(tmp_path)
    assert [len(request["item_ids"]) for request in requests] == [1, 50, 100]
    assert all(request["item_ids"].max() < 0 and request["user_id"][0] < 0 for request in requests)
    assert all(len(np.unique(request["item_ids"])) == len(request["item_ids"]) for request in requests)


def test_the_latest_recorded_requests_are_asked_as_of_now(tmp_path: Path) -> None:
    """What comes back is what was recorded, without its time and the version that answered it."""
    context = {"context_numeric": np.array([0.5], np.float32), "context_present": np.array([True])}
    requests = [{"user_id": np.array([n]), "item_ids": np.array([1, 2])} | context for n in range(MOST_RECORDED + 3)]
    record(tmp_path, [r | {"event_time": np.array([1]), "version": np.array([7])} for r in requests])
    recorded = warm_up_requests(tmp_path)[3:]
    assert [int(request["user_id"][0]) for request in recorded] == list(range(3, MOST_RECORDED + 3))
    assert {name: (value.dtype.name, value.tolist()) for name, value in recorded[0].items()} == {
        "user_id": ("int64", [3]),
        "item_ids": ("int64", [1, 2]),
        "context_numeric": ("float32", [0.5]),
        "context_present": ("bool", [True]),
    }


@pytest.mark.parametrize(
    "content",
    [
        [{"user_id": [1]}],
        {"user_id": [1]},
        [{"user_id": [1], "item_ids": ["x"]}],
        [3],
        [{"user_id": [1], "item_ids": [1], "colour": [1]}],
    ],
)
def test_a_recording_that_is_something_else_is_named(tmp_path: Path, content: object) -> None:
    """The error says which file, and that it may go."""
    write_json(recorded_path(tmp_path), content)
    with pytest.raises(ServingError, match=r"recorded\.json.*remove the file or record again"):
        warm_up_requests(tmp_path)


def test_a_version_has_ranked_before_it_serves(world: RankingWorld, recorded: Path) -> None:
    """A recorded request is answered by the new version while the old one still serves; then it serves at once."""
    record(world.workspace.requests, [{"user_id": np.array([1]), "item_ids": np.array([1, 2, 3])}])
    pointer = publish(unseen(world, "warm"), settings().triton_grpc_url, world.repository)
    with Client.for_dataset(world.data) as client:
        assert client.rank_ids(1, [1, 2, 3]).model_version == pointer.version


def test_a_version_whose_requests_cannot_be_encoded_never_serves(world: RankingWorld) -> None:
    """The ranker itself is right, so golden answers alone would let it pass; it is unloaded and what served serves."""
    before, bundle = world.repository.served(), unseen(world, "no encoder")
    assert before
    (bundle / "encoder.safetensors").unlink()
    with pytest.raises(ServingError, match=rf"not put in service.*ranking.*version {before.version} is still served"):
        publish(bundle, settings().triton_grpc_url, world.repository)
    assert world.repository.served() == before
    with TritonClient(settings().triton_grpc_url) as client:
        assert not client.is_model_ready("ranker", before.version + 1)
    with Client.for_dataset(world.data) as client:
        assert client.rank_ids(1, [1]).model_version == before.version


def test_a_version_that_refuses_what_clients_send_never_serves(world: RankingWorld, recorded: Path) -> None:
    """Here a context column that its schema does not have."""
    before = world.repository.served()
    request = {"user_id": np.array([1]), "item_ids": np.array([1]), "context_numeric": np.zeros(99, np.float32)}
    record(world.workspace.requests, [request])
    with pytest.raises(ServingError, match="context_numeric: received 99 values"):
        publish(unseen(world, "other context"), settings().triton_grpc_url, world.repository)
    assert world.repository.served() == before
