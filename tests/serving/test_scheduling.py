"""Giving way: who publishes lets requests go first, and nobody else is slowed for good."""

import os
import subprocess
import sys
import threading

from freshrank.serving.cpu import NICE, lower_priority


def nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_only_the_thread_that_asks_gives_way() -> None:
    """On Linux a priority belongs to a thread; those it starts inherit it."""
    before, values = nice(), []

    def work() -> None:
        lower_priority()
        child = threading.Thread(target=lambda: values.append(nice()))
        child.start()
        child.join()
        values.append(nice())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert values == [max(NICE, before)] * 2
    assert nice() == before


def test_who_already_gives_way_more_goes_on_doing_so() -> None:
    """`nice -n 15 freshrank publish` stays at 15."""
    program = (
        "import os; os.nice(15)\nfrom freshrank.serving.cpu import lower_priority\nlower_priority(); print(os.nice(0))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "15\n"
