"""Run tasks in processes of one thread each: progress, clean Ctrl-C, and a failed task does not stop the others."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from freshrank.bench.paper.task import Task, is_done, perform

log = logging.getLogger(__name__)
_RESTARTS = 2
"""How often a pool that lost a worker (killed, out of memory) is restarted."""


@dataclass(frozen=True)
class Failure:
    task: Task
    reason: str


def run_all(tasks: list[Task], jobs: int, console: Console, what: str) -> list[Failure]:
    """Run those of ``tasks`` that are not done; returns the failures.

    With one job they run in this process, else in ``jobs`` spawned ones that die with it.
    """
    pending = [task for task in tasks if not is_done(task)]
    with _Watch(console, what, len(tasks), len(tasks) - len(pending)) as watch:
        if jobs == 1:
            return _here(pending, watch)
        failures: list[Failure] = []
        for _ in range(_RESTARTS + 1):
            failed, pending = _spread(pending, jobs, watch)
            failures += failed
            if not pending:
                return failures
            console.print(f"[yellow]a worker died (out of memory?); {len(pending)} tasks were not finished[/]")
    return [*failures, *(Failure(task, "its worker died") for task in pending)]


class _Watch:
    """done/total, time left and what is running; plain lines where nobody watches."""

    def __init__(self, console: Console, what: str, total: int, done: int) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn(what),
            BarColumn(30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[running]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar = self.progress.add_task(what, total=total, completed=done, running="")
        self.done, self.total, self.started = done, total, time.monotonic()
        self.fresh = 0

    def __enter__(self) -> "_Watch":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def running(self, tasks: list[Task]) -> None:
        self.progress.update(self.bar, running=", ".join(task.label for task in tasks))

    def finished(self, task: Task, failure: str | None) -> None:
        self.done, self.fresh = self.done + 1, self.fresh + 1
        self.progress.advance(self.bar)
        if failure:
            self.console.print(f"[red]{task.label} failed:[/] {escape(failure)}", highlight=False)
        elif not self.console.is_terminal:
            left = (self.total - self.done) * (time.monotonic() - self.started) / self.fresh / 60
            self.console.print(f"{self.done}/{self.total} {task.label}, about {left:.0f} min left", highlight=False)


def _here(tasks: list[Task], watch: _Watch) -> list[Failure]:
    threads, failures = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for task in tasks:
            watch.running([task])
            reason = _attempt(task)
            failures += [Failure(task, reason)] if reason else []
            watch.finished(task, reason)
    finally:
        torch.set_num_threads(threads)
    return failures


def _attempt(task: Task) -> str | None:
    """Perform the task; the reason where it failed."""
    try:
        perform(task)
    except Exception as error:
        log.info("%s failed", task.label, exc_info=True)
        return f"{type(error).__name__}: {error}"
    return None


def _spread(tasks: list[Task], jobs: int, watch: _Watch) -> tuple[list[Failure], list[Task]]:
    """Failures, and the tasks left over when the pool broke."""
    failures: list[Failure] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker, (os.getpid(), log.getEffectiveLevel())) as pool:
        waiting: dict[Future[str | None], Task] = {pool.submit(_attempt, task): task for task in tasks}
        try:
            while waiting:
                watch.running(list(waiting.values())[:jobs])
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    reason = future.result()
                    task = waiting.pop(future)
                    failures += [Failure(task, reason)] if reason else []
                    watch.finished(task, reason)
        except BrokenProcessPool:
            return failures, [task for task in waiting.values() if not is_done(task)]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()
            raise
    return failures, []


def _start_worker(parent: int, level: int) -> None:
    """One thread; ignores SIGINT, because the parent stops it, and ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=level)
    torch.set_num_threads(1)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
