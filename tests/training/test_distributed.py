"""Two processes started by torchrun, over gloo, against one; and nodes that die on the way."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from freshrank.orchestration.kubeflow.settings import ClusterSettings
from freshrank.orchestration.kubeflow.trainjob import manifest
from freshrank.recipes import recipe
from freshrank.settings import settings
from freshrank.storage.files import sha256_of
from freshrank.training.batches import labels_of
from freshrank.training.objective import masked_bce
from freshrank.training.trained import Trained, predict
from tests.homes import Home
from tests.rank import SCHEMA, frame, trained

pytestmark = pytest.mark.integration

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")


def _started(*arguments: str, environment: dict[str, str] | None = None) -> None:
    port = ("--master-port", str(np.random.default_rng().integers(20_000, 30_000)))
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, *port, *arguments],
        env=(environment or dict(os.environ)) | threads,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    _started("-m", "tests.rank", str(out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("source", ["memory", "stream"])
def test_both_ranks_hold_the_same_ranker(ranks: Path, source: str) -> None:
    """To the bit."""
    assert len({sha256_of(ranks / f"{source}-{rank}" / "ranker.safetensors") for rank in (0, 1)}) == 1


@pytest.mark.slow
def test_two_processes_train_the_ranker_of_one_on_the_same_batches(ranks: Path, tmp_path: Path) -> None:
    """45 steps of 64 rows, 32 on each: losses to 1e-4, weights to 1e-3 (sums in another order, amplified by Adam)."""
    one, two = trained("memory", tmp_path / "shards"), Trained.load(ranks / "memory-0")
    curves = [each.facts["curve"]["losses"]["bce"] for each in (one, two)]
    assert np.allclose(*curves, rtol=1e-4, atol=0)
    weights = two.ranker.state_dict()
    assert all(torch.allclose(value, weights[name], atol=1e-3) for name, value in one.ranker.state_dict().items())


@pytest.mark.slow
def test_two_processes_on_shards_of_their_own_reach_the_loss_of_one(ranks: Path, tmp_path: Path) -> None:
    """Other rows in every batch, the same number of them: after three epochs, loss over all rows to 3%, where another
    seed moves that of one process by 2%."""
    one, two = trained("stream", tmp_path / "shards"), Trained.load(ranks / "stream-0")
    assert one.facts["curve"]["steps"] == two.facts["curve"]["steps"]
    first = one.facts["curve"]["losses"]["bce"][0]
    assert _loss(one) < 0.9 * first
    assert _loss(two) == pytest.approx(_loss(one), rel=0.03)


def _loss(trained: Trained) -> float:
    logits, labels = predict(trained, frame("stream"), frame("stream").items), labels_of(frame("stream"), SCHEMA)
    return float(masked_bce(torch.from_numpy(logits), torch.from_numpy(labels)))


@pytest.mark.slow
def test_torchrun_starts_freshrank_train_and_one_process_writes_it(tmp_path: Path) -> None:
    """Streamed; a second start finds it done."""
    home = Home.make(tmp_path)
    shared = ("--data", str(home.data), "--date", "2024-01-07")
    build = [sys.executable, "-m", "freshrank", "features", "build", *shared]
    subprocess.run(build, env=home.environment, check=True, capture_output=True)
    sets = [part for value in ("training.window_rows=2000", "windows.train_days=3") for part in ("--set", value)]
    train = ("-m", "freshrank", "train", *shared, *sets)
    _started(*train, "--out", str(tmp_path / "ranker"), environment=home.environment)
    _started(*train, "--out", str(tmp_path / "again"), environment=home.environment)
    assert sha256_of(tmp_path / "ranker" / "ranker.json") == sha256_of(tmp_path / "again" / "ranker.json")
    assert len(list((tmp_path / "home" / "steps").glob("*/train/*"))) == 1


CONFIG = recipe(
    "warmer-for-less",
    ["training.window_rows=2000", "training.checkpoint_every=4", "training.batch_size=64", "windows.train_days=3"],
)
TWO_NODES = ClusterSettings(image="i", home_claim="c", train_nodes=2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def free_port() -> int:
    return _free_port()


@dataclass
class Nodes:
    """Agents of torchrun as a TrainJob starts them, two pods that happen to share this machine."""

    home: Home
    connect_seconds: int = 600
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.port = _free_port()

    def command(self) -> list[str]:
        """The manifest's own, with what Kubernetes puts in the place of variables."""
        sections = {
            name: getattr(CONFIG, name).model_dump_json() for name in ("windows", "model", "techniques", "training")
        }
        request = {"data": str(self.home.data), "run_date": "2024-01-07", **sections}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(settings(), "train_connect_seconds", self.connect_seconds)
            trainer = manifest("freshrank-train-x", request, TWO_NODES)["spec"]["trainer"]
        known = {"$(PET_MASTER_ADDR)": "127.0.0.1", "$(PET_MASTER_PORT)": str(self.port)}
        arguments = list(trainer["args"])
        for variable, value in known.items():
            arguments = [argument.replace(variable, value) for argument in arguments]
        return [sys.executable, *trainer["command"][1:], *arguments]

    def wait_until_open(self) -> None:
        """The first agent holds the others together; were it not there yet, the second one on this machine would."""
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", self.port)):
                time.sleep(0.05)

    def start(self, rank: int) -> subprocess.Popen[bytes]:
        of_trainer = {
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "1",
            "PET_NODE_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(self.port),
        }
        agent = subprocess.Popen(
            self.command(),
            env=self.home.environment | of_trainer,
            start_new_session=True,
            stderr=(self.home.path / f"node-{rank}.log").open("ab"),
        )
        self.agents.append(agent)
        return agent

    def is_kept(self) -> bool:
        return bool(list((self.home.path / "home" / "checkpoints").rglob("2/state.json")))

    def wait_until_kept(self, process: subprocess.Popen[bytes]) -> None:
        while not self.is_kept():
            assert process.poll() is None, self.log()
            time.sleep(0.01)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.home.path.glob("node-*.log")))

    def lose(self, agent: subprocess.Popen[bytes]) -> None:
        """The node of ``agent``, all at once."""
        if agent.poll() is None:
            for process in [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]:
                process.kill()
        agent.wait()

    def end(self) -> None:
        for agent in self.agents:
            self.lose(agent)

    def weights(self) -> str:
        (stored,) = (self.home.path / "home" / "steps").glob("*/train/*/ranker.safetensors")
        return sha256_of(stored)


def _worker_of(agent: subprocess.Popen[bytes]) -> int:
    (worker,) = psutil.Process(agent.pid).children()
    return worker.pid


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    nodes = Nodes(_featured(tmp_path_factory.mktemp("undisturbed")))
    with ExitStack() as stack:
        stack.callback(nodes.end)
        assert [agent.wait(100) for agent in [nodes.start(0), nodes.start(1)]] == [0, 0], nodes.log()
        yield nodes.weights()


def _featured(path: Path) -> Home:
    home = Home.make(path)
    build = [sys.executable, "-m", "freshrank", "features", "build", "--data", str(home.data), "--date", "2024-01-07"]
    subprocess.run(build, env=home.environment, check=True, capture_output=True)
    return home


@pytest.mark.slow
def test_a_worker_killed_in_mid_epoch_is_started_anew_with_the_others(undisturbed: str, tmp_path: Path) -> None:
    """kill -9 on the second node's process; torchrun starts both anew and the ranker is that of an undisturbed run."""
    nodes = Nodes(_featured(tmp_path))
    with ExitStack() as stack:
        stack.callback(nodes.end)
        first, second = nodes.start(0), nodes.start(1)
        nodes.wait_until_kept(first)
        os.kill(_worker_of(second), signal.SIGKILL)
        assert [first.wait(100), second.wait(100)] == [0, 0], nodes.log()
    assert "goes on after step" in nodes.log()
    assert nodes.weights() == undisturbed


@pytest.mark.slow
def test_a_job_that_lost_a_node_goes_on_when_it_is_started_again(undisturbed: str, tmp_path: Path) -> None:
    """kill -9 on agents and processes in mid-epoch, then the same job on new nodes, as a retried step does."""
    home = _featured(tmp_path)
    with ExitStack() as stack:
        for nodes in (Nodes(home), Nodes(home)):
            stack.callback(nodes.end)
            agents = [nodes.start(0), nodes.start(1)]
            if not nodes.is_kept():
                nodes.wait_until_kept(agents[0])
                nodes.end()
        assert [agent.wait(100) for agent in agents] == [0, 0], nodes.log()
    assert "goes on after step" in nodes.log()
    assert nodes.weights() == undisturbed


@pytest.mark.slow
def test_a_node_that_comes_for_a_lost_one_is_taken_in_by_the_survivor(undisturbed: str, tmp_path: Path) -> None:
    """kill -9 on the second node's agent and process in mid-epoch, and a new second node: the job goes on."""
    nodes = Nodes(_featured(tmp_path))
    with ExitStack() as stack:
        stack.callback(nodes.end)
        first = nodes.start(0)
        nodes.wait_until_open()
        lost = nodes.start(1)
        nodes.wait_until_kept(first)
        nodes.lose(lost)
        agents = [first, nodes.start(1)]
        assert [agent.wait(100) for agent in agents] == [0, 0], nodes.log()
    assert "goes on after step" in nodes.log()
    assert nodes.weights() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "reason"), [(1, "not all nodes were there within join_timeout"), (0, "holds the others together is gone")]
)
def test_a_survivor_to_whom_nobody_comes_ends_and_says_why(tmp_path: Path, lost: int, reason: str) -> None:
    """So that whatever restarts the job does; its last line is the reason."""
    nodes = Nodes(_featured(tmp_path), connect_seconds=20)
    with ExitStack() as stack:
        stack.callback(nodes.end)
        agents = [nodes.start(0)]
        nodes.wait_until_open()
        agents.append(nodes.start(1))
        nodes.wait_until_kept(agents[0])
        nodes.lose(agents[lost])
        assert agents[1 - lost].wait(60) == 1
    last = (nodes.home.path / f"node-{1 - lost}.log").read_text().splitlines()[-1]
    assert reason in last
    assert last.endswith("started again, it goes on from the checkpoint")


RANK = """
import sys, time
import torch
from freshrank.training.distributed import joined
with joined() as group:
    time.sleep(2.5 * group.rank)
    group.wait()
    print("waited", flush=True)
    time.sleep(6 * group.rank)
    group.gathered(torch.zeros(1))
"""


def _rank(rank: int, port: int, **settings: str) -> subprocess.Popen[str]:
    of_torchrun = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-c", RANK],
        env=os.environ | of_torchrun | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_process_that_is_alone_ends_after_the_time_to_connect(free_port: int) -> None:
    """And not after the time that files may take."""
    alone = _rank(0, free_port, FRESHRANK_TRAIN_CONNECT_SECONDS="0.5")
    _, errors = alone.communicate(timeout=30)
    assert re.search(r"PipelineFailed: rank 0 of 2: other processes did not come within 0\.5 s .*_CONNECT_", errors)


@pytest.mark.slow
def test_files_may_take_longer_than_a_step_and_a_step_has_its_own_limit(free_port: int) -> None:
    """The second process comes late twice: waited for the first time, given up in an exchange."""
    ranks = [_rank(rank, free_port, FRESHRANK_TRAIN_EXCHANGE_SECONDS="1") for rank in (0, 1)]
    said, errors = ranks[0].communicate(timeout=60)
    ranks[1].communicate(timeout=60)
    assert said == "waited\n"
    assert re.search(r"PipelineFailed: rank 0 of 2: other processes ended, or kept it waiting for 1 s", errors)
