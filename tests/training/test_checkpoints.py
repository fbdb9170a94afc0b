"""A training that is killed goes on at the very batch, and ends with the very ranker."""

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from freshrank.config import (
    FeatureDropoutConfig,
    HistoryMaskingConfig,
    MixupConfig,
    ModelConfig,
    PretrainingConfig,
    TechniquesConfig,
)
from freshrank.errors import StorageError
from freshrank.models.ranker import Ranker
from freshrank.storage.files import read_json, sha256_of
from freshrank.storage.object_store import ObjectStore
from freshrank.training.batches import Batch, Encoded
from freshrank.training.checkpoints import Checkpoints
from freshrank.training.distributed import ProcessGroup
from freshrank.training.loop import train_encoded
from freshrank.training.state import Generators, State
from freshrank.training.trained import Trained
from tests.homes import Home
from tests.models.test_ranker import FRAME, SCHEMA, SMALL, TRAINING
from tests.object_stores import BUCKET, Proxy, bare_client
from tests.streams import stream_of

pytestmark = pytest.mark.integration

DRAWING = TechniquesConfig(
    mixup=MixupConfig(),
    feature_dropout=FeatureDropoutConfig(),
    history_masking=HistoryMaskingConfig(),
    pretraining=PretrainingConfig(steps=2),
)
"""Everything that draws random numbers; dropout of the model besides."""
DROPPING = SMALL.model_copy(update={"dropout": 0.2})


class Killed(Exception):
    pass


def _killed_at(step: int) -> object:
    def watch(number: int, ranker: Ranker, batch: Batch) -> None:
        if number == step:
            raise Killed

    return watch


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoded]:
    return {
        "memory": Encoded.of(FRAME, FRAME.items, SCHEMA, 1),
        "stream": stream_of(FRAME, SCHEMA, tmp_path_factory.mktemp("shards")),
    }


def trained(encoded: Encoded, model: ModelConfig, checkpoints: Checkpoints | None = None, kill: int = 0) -> Trained:
    watch = _killed_at(kill) if kill else None
    return train_encoded(encoded, model, DRAWING, TRAINING, watch, checkpoints)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["memory", "stream"])
@pytest.mark.parametrize("kill", [3, 8, 19])
def test_a_training_killed_at_any_step_ends_with_the_ranker_of_an_undisturbed_one(
    sources: dict[str, Encoded], source: str, kill: int, tmp_path: Path
) -> None:
    """26 steps in two epochs, kept every second one; weights and curve to the bit."""
    undisturbed = trained(sources[source], DROPPING)
    checkpoints = Checkpoints(tmp_path / "kept", every=2)
    with pytest.raises(Killed):
        trained(sources[source], DROPPING, checkpoints, kill)
    assert read_json(checkpoints.directory / "state.json")["step"] == (kill - 1) // 2 * 2
    torch.manual_seed(99)  # what the process drew before must not matter
    resumed = trained(sources[source], DROPPING, checkpoints)
    weights = resumed.ranker.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in undisturbed.ranker.state_dict().items())
    assert resumed.facts["curve"] == undisturbed.facts["curve"]


def test_the_steps_before_the_kept_one_are_not_done_again(sources: dict[str, Encoded], tmp_path: Path) -> None:
    """Killed before step 8, kept after 6: 7 to 26 are left."""
    checkpoints, steps = Checkpoints(tmp_path / "kept", every=3), []
    with pytest.raises(Killed):
        trained(sources["stream"], SMALL, checkpoints, 8)
    train_encoded(sources["stream"], SMALL, DRAWING, TRAINING, lambda step, *_: steps.append(step), checkpoints)
    assert steps == list(range(7, 27))


def test_a_training_that_is_never_kept_leaves_nothing(sources: dict[str, Encoded], tmp_path: Path) -> None:
    """Every 0 steps is never."""
    trained(sources["memory"], SMALL, Checkpoints(tmp_path / "kept", every=0))
    assert not list(tmp_path.iterdir())


def test_no_file_of_a_checkpoint_can_run_code(sources: dict[str, Encoded], tmp_path: Path) -> None:
    """Tensors as safetensors and the rest as JSON."""
    checkpoints = Checkpoints(tmp_path / "kept", every=2)
    trained(sources["memory"], SMALL, checkpoints)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["state.json", "state.safetensors"]


def _state() -> State:
    ranker = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(ranker.parameters())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    return State(ranker, optimizer, schedule, Generators(0), step=4)


def test_every_rank_gets_its_own_random_state_back(tmp_path: Path) -> None:
    """Also the second: torch takes a row of a tensor for the tensor's first."""
    checkpoints, before, other = Checkpoints(tmp_path / "kept", 2), _state(), torch.Generator().manual_seed(7)
    before.draws.generator(1)
    checkpoints.save(before)
    tensors = load_file(checkpoints.directory / "state.safetensors")
    ranks = {
        name: torch.stack([tensor[0], other.get_state()])
        for name, tensor in tensors.items()
        if name.startswith("random.")
    }
    save_file(tensors | ranks, checkpoints.directory / "state.safetensors")
    after = _state()
    Checkpoints(checkpoints.directory, 2, ProcessGroup(rank=1, size=2)).restore(after)
    assert after.step == 4
    assert torch.equal(after.draws.generator(1).get_state(), other.get_state())
    assert torch.equal(torch.get_rng_state(), other.get_state())


@pytest.fixture
def store(proxy: Proxy) -> ObjectStore:
    return ObjectStore(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def trained_with(store: ObjectStore, disk: Path, encoded: Encoded, kill: int = 0) -> Trained:
    with Checkpoints.opened(disk, 2, store=store, name="checkpoints/x") as checkpoints:
        return trained(encoded, DROPPING, checkpoints, kill)


def test_a_training_goes_on_at_the_very_batch_on_another_node(
    sources: dict[str, Encoded], store: ObjectStore, tmp_path: Path
) -> None:
    """Its disk is empty; what the store holds is enough, and it holds two copies at most."""
    undisturbed = trained(sources["memory"], DROPPING)
    with pytest.raises(Killed):
        trained_with(store, tmp_path / "one", sources["memory"], 19)
    copy = store.newest("checkpoints/x")
    assert copy is not None
    assert 2 <= copy.facts["step"] <= 18
    assert len(store._list("checkpoints/x", "manifests")) <= 2
    with Checkpoints.opened(tmp_path / "other", 2, store=store, name="checkpoints/x") as checkpoints:
        assert read_json(checkpoints.directory / "state.json")["step"] == copy.facts["step"]
        resumed = trained(sources["memory"], DROPPING, checkpoints)
    weights = resumed.ranker.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in undisturbed.ranker.state_dict().items())
    assert resumed.facts["curve"] == undisturbed.facts["curve"]


@pytest.mark.slow
def test_a_copy_older_than_what_the_node_has_is_left(
    sources: dict[str, Encoded], store: ObjectStore, tmp_path: Path
) -> None:
    """The upload may have been behind when the process died."""
    with pytest.raises(Killed):
        trained_with(store, tmp_path / "one", sources["memory"], 4)
    ahead = Checkpoints(tmp_path / "two", 2)
    with pytest.raises(Killed):
        trained(sources["memory"], DROPPING, ahead, 19)
    with Checkpoints.opened(ahead.directory, 2, store=store, name="checkpoints/x"):
        assert read_json(ahead.directory / "state.json")["step"] == 18


def test_an_upload_holds_nothing_up(
    sources: dict[str, Encoded], store: ObjectStore, proxy: Proxy, tmp_path: Path
) -> None:
    """The store takes nothing more after the first object, and all 26 steps are done; one upload was tried."""
    proxy.hold_after, steps = 1, []
    with Checkpoints.opened(tmp_path / "kept", 2, store=store, name="checkpoints/x") as checkpoints:
        train_encoded(sources["memory"], SMALL, DRAWING, TRAINING, lambda step, *_: steps.append(step), checkpoints)
        assert steps == list(range(1, 27))
        assert proxy.held.is_set()
        assert len([path for path in tmp_path.iterdir() if path.name.startswith(".upload-")]) == 1
        proxy.hold_after = None
        proxy.released.set()
    copy = store.newest("checkpoints/x")
    assert copy is not None
    assert copy.facts["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_store_that_fails_on_the_way_costs_the_copy_and_not_the_training(
    sources: dict[str, Encoded], store: ObjectStore, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in the log; the node keeps its own."""
    with Checkpoints.opened(tmp_path / "kept", 20, store=store, name="checkpoints/x") as checkpoints:
        proxy.unavailable = 1000
        trained(sources["memory"], SMALL, checkpoints)
    assert "after step 20 is kept on this node alone" in caplog.text
    assert read_json(checkpoints.directory / "state.json")["step"] == 20


def test_a_store_that_is_away_at_the_start_is_an_error(store: ObjectStore, proxy: Proxy, tmp_path: Path) -> None:
    """Training anew would throw away what the store may hold."""
    proxy.unavailable = 1000
    with pytest.raises(StorageError), Checkpoints.opened(tmp_path / "kept", 2, store=store, name="checkpoints/x"):
        pass


@pytest.mark.slow
def test_a_broken_copy_is_passed_over(store: ObjectStore, tmp_path: Path, sources: dict[str, Encoded]) -> None:
    """The one before it is taken."""
    for step in (4, 8):
        with pytest.raises(Killed):
            trained_with(store, tmp_path / "one", sources["memory"], step)
    copy = store.newest("checkpoints/x")
    assert copy is not None
    sha256 = copy.files["state.safetensors"].sha256
    prefix = store.url.rpartition("/")[2]
    bare_client().put_object(Bucket=BUCKET, Key=f"{prefix}/checkpoints/x/objects/{sha256}", Body=b"half")
    with Checkpoints.opened(tmp_path / "other", 2, store=store, name="checkpoints/x") as checkpoints:
        assert read_json(checkpoints.directory / "state.json")["step"] < copy.facts["step"]


@pytest.mark.slow
def test_freshrank_train_killed_with_kill_9_is_finished_by_the_same_command(tmp_path: Path) -> None:
    """In the middle of a streamed epoch; the ranker's file is that of a run nobody disturbed, and nothing is left."""
    homes = [Home.make(tmp_path / name) for name in ("undisturbed", "killed")]
    arguments = (
        "train",
        "--date",
        "2024-01-07",
        *_sets(
            "training.window_rows=2000", "training.checkpoint_every=5", "training.batch_size=64", "windows.train_days=3"
        ),
    )
    weights = []
    for home in homes:
        build = [sys.executable, "-m", "freshrank", "features", "build", "--data", str(home.data), *arguments[1:3]]
        subprocess.run(build, env=home.environment, check=True, capture_output=True)
    _kill_once_kept(homes[1], arguments)
    for home in homes:
        done = home.freshrank(*arguments, "--out", str(home.path / "ranker"))
        assert done.returncode == 0, done.stderr
        weights.append(sha256_of(home.path / "ranker" / "ranker.safetensors"))
    assert "goes on after step" in done.stderr
    assert weights[0] == weights[1]
    assert not list((homes[1].path / "home" / "checkpoints").rglob("state.*"))


def _sets(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _kill_once_kept(home: Home, arguments: tuple[str, ...]) -> None:
    with subprocess.Popen(home.command(*arguments), env=home.environment, stderr=subprocess.DEVNULL) as process:
        while not list((home.path / "home" / "checkpoints").rglob("1/state.json")):
            assert process.poll() is None, "it ended before it was kept"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_freshrank_train_pre_empted_on_one_node_is_finished_on_another(proxy: Proxy, tmp_path: Path) -> None:
    """kill -9, then a workspace that has nothing but the bucket: the very ranker, and the bucket is empty again."""
    store = {"FRESHRANK_STORAGE_URL": f"s3://{BUCKET}/{uuid.uuid4().hex}"}
    homes = [Home.make(tmp_path / name) for name in ("undisturbed", "pre-empted", "another")]
    arguments = (
        "train",
        "--date",
        "2024-01-07",
        *_sets(
            "training.window_rows=2000", "training.checkpoint_every=5", "training.batch_size=64", "windows.train_days=3"
        ),
    )
    for home in homes:
        build = [sys.executable, "-m", "freshrank", "features", "build", "--data", str(home.data), *arguments[1:3]]
        subprocess.run(build, env=home.environment, check=True, capture_output=True)
    for home in homes[1:]:
        home.environment |= store
    object_store = ObjectStore(store["FRESHRANK_STORAGE_URL"])
    with subprocess.Popen(homes[1].command(*arguments), env=homes[1].environment, stderr=subprocess.DEVNULL) as process:
        while not any("/manifests/" in path for path in proxy.uploads):
            assert process.poll() is None, "it ended before it was kept"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    weights = []
    for home in (homes[0], homes[2]):
        done = home.freshrank(*arguments, "--out", str(home.path / "ranker"))
        assert done.returncode == 0, done.stderr
        weights.append(sha256_of(home.path / "ranker" / "ranker.safetensors"))
    assert "goes on after step" in done.stderr
    assert weights[0] == weights[1]
    assert not object_store._fs.find(f"{object_store._root}/checkpoints")
