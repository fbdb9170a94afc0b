"""What a publication warms a version up with is what was asked lately."""

import time
from pathlib import Path

import numpy as np

from freshrank.serving.probe_requests import MOST_RECORDED, recorded_path, warm_up_requests
from freshrank.serving.ranking.recorder import Recorder


def request(user: int) -> dict:
    """As on the wire."""
    context = {"context_numeric": np.array([[1.5]], np.float32)}
    return {"user_id": np.array([[user]]), "item_ids": np.array([[user, user + 1]])} | context


def test_the_last_requests_are_found_by_the_next_publication(tmp_path: Path) -> None:
    """Once enough have come; their memory may be used again by then."""
    recorder = Recorder(tmp_path, sample_seconds=0)
    for user in range(MOST_RECORDED + 5):
        asked = request(user)
        recorder.offer(asked)
        asked["item_ids"][:] = -1
    deadline = time.monotonic() + 10
    while not recorded_path(tmp_path).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    recorded = warm_up_requests(tmp_path)[-MOST_RECORDED:]
    assert [each["user_id"].tolist() for each in recorded] == [[user] for user in range(MOST_RECORDED)]
    assert [each["item_ids"].tolist() for each in recorded] == [[user, user + 1] for user in range(MOST_RECORDED)]


def test_one_request_a_second_is_enough(tmp_path: Path) -> None:
    """A burst leaves one, and nothing is written before there are enough."""
    recorder = Recorder(tmp_path)
    for user in range(1000):
        recorder.offer(request(user))
    assert len(recorder._recorded) == 1
    assert not recorded_path(tmp_path).exists()
