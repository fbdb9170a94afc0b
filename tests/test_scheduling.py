"""Giving way: who loads or publishes lets requests go first, and nobody else is slowed for good."""

import os
import subprocess
import sys
import threading

from freshrank.scheduling import NICE, give_way, import_giving_way


def nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_only_the_thread_that_asks_gives_way() -> None:
    """On Linux a priority belongs to a thread; those it starts inherit it."""
    before, found = nice(), []

    def work() -> None:
        give_way()
        child = threading.Thread(target=lambda: found.append(nice()))
        child.start()
        child.join()
        found.append(nice())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [max(NICE, before)] * 2
    assert nice() == before


def test_who_already_gives_way_more_goes_on_doing_so() -> None:
    """`nice -n 15 freshrank publish` stays at 15."""
    program = "import os; os.nice(15)\nfrom freshrank.scheduling import give_way\ngive_way(); print(os.nice(0))"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "15\n"


def test_imports_give_way_and_their_importer_does_not() -> None:
    """What is imported is there afterwards, and a failure shows where it is imported again."""
    before = nice()
    sys.modules.pop("colorsys", None)
    import_giving_way("colorsys")
    assert "colorsys" in sys.modules
    assert nice() == before
