"""Publishing into a running Triton: nothing wrong is ever served and nothing right is ever interrupted."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from served import Served
from tiny_bundles import OUTPUTS, SIGNATURE, expected, request

from freshrank.bundle.golden import Tensors
from freshrank.errors import ServingError
from freshrank.serving.deploy.publish import publish, rollback
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.serving.triton import TritonClient
from freshrank.storage.files import read_json, write_json


def same_bytes(left: Tensors, right: Tensors) -> bool:
    return all(left[name].tobytes() == right[name].tobytes() for name in OUTPUTS)


def test_publishing_the_same_bundle_twice_installs_one_version(running: Served) -> None:
    """A day that is run again changes nothing."""
    bundle = running.bundle(1.0)
    first = publish(bundle, running.url, running.repository)
    installed = running.repository.versions()
    assert publish(bundle, running.url, running.repository) == first
    assert running.repository.versions() == installed


def test_two_versions_answer_side_by_side(running: Served) -> None:
    """The version that is left stays loaded beside the one that took over."""
    old, new = running.publish(1.0), running.publish(2.0)
    assert (new.version, new.previous) == (old.version + 1, old.version)
    for version, weight in ((old.version, 1.0), (new.version, 2.0)):
        score = running.ask(version)["score"]
        assert abs(score - expected(request(), weight)["score"]).max() < 1e-6
    assert running.server.status().models["ranker"] == [old.version, new.version]


def test_no_thread_of_a_version_that_answers_gives_way(running: Served) -> None:
    """Every thread of its process, those of its thread pool included, has the priority of the server."""
    version = running.publish(1.0).version
    running.ask(version)
    (process,) = [p for p in running.server._own_processes() if f"/ranker/{version}/model.py" in " ".join(p.cmdline())]
    threads = [thread.id for thread in process.threads()]
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {os.getpriority(os.PRIO_PROCESS, 0)}


@pytest.mark.parametrize("wrong_case", [0, 1], ids=["refused at load", "refused at replay"])
def test_a_bundle_with_a_wrong_golden_answer_is_never_served(running: Served, wrong_case: int) -> None:
    """The pointer stays, the old version answers bit-identically, and the error says what differed."""
    pointer = running.publish(1.0)
    before = running.ask(pointer.version)
    with pytest.raises(ServingError, match=f"golden case {wrong_case}: output 'score' differs by 0.1"):
        publish(running.bundle(3.0, wrong_case=wrong_case), running.url, running.repository)
    assert running.repository.served() == pointer
    assert running.server.status().models["ranker"] == pointer.live
    assert same_bytes(running.ask(pointer.version), before)


def test_the_number_of_a_rejected_version_is_not_given_again(running: Served) -> None:
    """A mended bundle is a new version, even under the fingerprint of the broken one."""
    served = running.publish(1.0).version
    with pytest.raises(ServingError, match=f"version {served + 1} was not put in service"):
        publish(running.bundle(3.0, wrong_case=1, fingerprint="mended"), running.url, running.repository)
    mended = publish(running.bundle(3.0, fingerprint="mended"), running.url, running.repository)
    assert mended.version == served + 2
    assert "differs" in read_json(running.repository.root / "rejected" / f"{served + 1}.json")["reason"]


def test_the_served_version_answers_every_request_while_another_is_published(running: Served) -> None:
    """Not one request fails and not one answer changes during a publication."""
    version = running.publish(1.0).version
    before = running.ask(version)
    done = threading.Event()
    answers: list[Tensors] = []

    def keep_asking() -> None:
        while not done.is_set():
            answers.append(running.ask(version))

    client = threading.Thread(target=keep_asking)
    client.start()
    try:
        running.publish(2.0)
    finally:
        done.set()
        client.join()
    assert len(answers) > 10
    assert all(same_bytes(answer, before) for answer in answers)


def test_roll_back_serves_the_previous_version_and_is_done_once(running: Served) -> None:
    """A repeated call, by a nervous hand or a retry, does not go further back or forward again."""
    old, new = running.publish(1.0), running.publish(2.0)
    back = rollback(running.url, running.repository)
    assert (back.version, back.previous, back.rolled_back_from) == (old.version, None, new.version)
    assert back.fingerprint == old.fingerprint
    assert rollback(running.url, running.repository) == back
    assert rollback(running.url, running.repository, to=new.version).version == new.version


def test_roll_back_needs_somewhere_to_go(running: Served, tmp_path: Path) -> None:
    """Without a publication, or to a version that is not there, the error says what there is."""
    with pytest.raises(ServingError, match="nothing is served yet"):
        rollback(running.url, ModelRepository(tmp_path / "empty"))
    running.publish(1.0)
    with pytest.raises(ServingError, match="version 9999 is not installed, only"):
        rollback(running.url, running.repository, to=9999)


def test_the_first_version_served_cannot_be_rolled_back(running: Served, tmp_path: Path) -> None:
    """Nothing was done, so nothing may look done."""
    repository = ModelRepository(tmp_path / "triton")
    version = repository.install_version(running.bundle(1.0))
    repository.point_to(Pointer(version=version, run_date="2022-05-01", fingerprint="first"))
    with pytest.raises(ServingError, match="no version before 1 has served"):
        rollback(running.url, repository)


def test_without_a_server_nothing_is_installed(running: Served, tmp_path: Path) -> None:
    """The error says how to start one."""
    repository = ModelRepository(tmp_path / "triton")
    with pytest.raises(ServingError, match="freshrank serve"):
        publish(running.bundle(1.0), "127.0.0.1:1", repository)
    assert repository.versions() == []


def test_a_server_that_stands_without_ranking_gets_it_before_the_pointer_moves(running: Served) -> None:
    """On a cluster the server starts before the model repository holds anything."""
    with TritonClient.controlling(running.repository, running.url) as client:
        client.unload("ranking")
        shutil.rmtree(running.repository.models / "ranking")
        assert not client.is_model_ready("ranking")
        running.publish(1.0)
        assert client.is_model_ready("ranking")


def test_a_version_with_another_input_is_served_beside_the_old_one(running: Served) -> None:
    """A new feature needs no second model: an input that only one version takes is optional for the other."""
    old = running.publish(1.0).version
    bundle = running.bundle(2.0, extra_input=True)
    new = publish(bundle, running.url, running.repository).version
    running.ask(old)
    running.ask(new, request() | {"item_age": request()["item_vector"][:, 0].copy()})
    with pytest.raises(ServingError, match="item_age"):
        running.ask(new)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.15, 0.35, 0.5])
def test_a_publication_killed_at_any_moment_is_finished_by_the_next(running: Served, delay: float) -> None:
    """After kill -9 the old or the new version is served; the same call again ends as if nothing had happened."""
    before = running.publish(1.0)
    bundle = running.bundle(2.0)
    kill_publication(bundle, running, delay)
    between = running.repository.served()
    assert between
    assert between.version in (before.version, before.version + 1)
    running.ask(between.version)
    after = publish(bundle, running.url, running.repository)
    assert (after.version, after.previous) == (before.version + 1, before.version)
    assert running.server.status().models["ranker"] == after.live
    assert not list((running.repository.models / "ranker").glob(".*"))


def kill_publication(bundle: Path, running: Served, delay: float) -> None:
    """Publish in another process and kill it ``delay`` seconds after it began."""
    program = (
        "import sys; from pathlib import Path\n"
        "from freshrank.serving.deploy.publish import publish\n"
        "from freshrank.serving.repository import ModelRepository\n"
        "repository = ModelRepository(Path(sys.argv[3]))\n"
        "print('go', flush=True)\n"
        "publish(Path(sys.argv[1]), sys.argv[2], repository)\n"
    )
    arguments = [str(bundle), running.url, str(running.repository.root)]
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        time.sleep(delay)
        child.kill()


def test_a_bundle_that_lacks_a_file_or_disagrees_with_itself_is_refused(running: Served) -> None:
    """The error names the file, what it holds and what was expected."""
    lacking = running.bundle(1.0)
    (lacking / "ranker.onnx").unlink()
    with pytest.raises(ServingError, match=r"lacks \['ranker.onnx'\]"):
        publish(lacking, running.url, running.repository)
    disagreeing = running.bundle(1.0)
    write_json(disagreeing / "signature.json", SIGNATURE | {"outputs": SIGNATURE["outputs"][:1]})
    with pytest.raises(ServingError, match=r"signature.json says \['probabilities'\]"):
        publish(disagreeing, running.url, running.repository)
