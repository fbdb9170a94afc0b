"""Waits for a Kubeflow run in Airflow's triggerer, where thousands of waits share one process.

Importable without kfp; the API's host and token come from the triggerer's own environment, not from the database.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from freshrank.errors import ClusterUnreachable, FreshrankError
from freshrank.orchestration.kubeflow.api import FINISHED, PipelinesApi, progress_of, run_page

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEFERRED = "deferred"


class RunTrigger(BaseTrigger):
    """Fires once, when the run has ended, is late, or can no longer be asked for.

    The event's payload is ``{"run_id", "state", "error"}``: ``state`` as the API names it, ``LATE`` or ``UNKNOWN``.
    """

    def __init__(self, run_id: str, namespace: str, deadline: float, poll_seconds: float) -> None:
        """``deadline`` is in seconds since 1970: a triggerer that starts anew does not wait anew."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.run_id = run_id
        self.namespace = namespace
        self.deadline = deadline
        self.poll_seconds = poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("run_id", "namespace", "deadline", "poll_seconds")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        try:
            state, error = await self._ended(), ""
        except FreshrankError as refused:
            state, error = "UNKNOWN", str(refused)
        yield TriggerEvent({"run_id": self.run_id, "state": state, "error": error})

    async def _ended(self) -> str:
        api, seen = PipelinesApi(self.namespace), ""
        while True:
            try:
                run = await asyncio.to_thread(api.run, self.run_id)
            except ClusterUnreachable as error:
                # The run goes on without an API server: only the deadline ends the wait.
                self.log.warning("%s; looking again", error)
            else:
                now = progress_of(run)
                if now != seen:
                    self.log.info("run %s: %s", self.run_id, now)
                seen = now
                if run.state in FINISHED:
                    return str(run.state)
            if time.time() > self.deadline:
                return "LATE"
            await asyncio.sleep(self.poll_seconds)

    async def on_kill(self) -> None:
        """Cancel the run when somebody marked or cleared the waiting task.

        Airflow calls this also in a triggerer whose triggers another one took over while it was out of touch. The
        task then still waits, and its run must go on.
        """
        try:
            state = await self._task_state()
        except Exception as error:
            # A run too many can be cancelled by hand; one cancelled wrongly costs a day's training.
            self.log.warning("run %s is not cancelled: its task's state is unknown (%s)", self.run_id, error)
            return
        if state == _DEFERRED:
            self.log.info("the task still waits for run %s: it goes on", self.run_id)
            return
        await self._cancel()

    async def _cancel(self) -> None:
        try:
            cancelled = await asyncio.to_thread(PipelinesApi(self.namespace).terminate, self.run_id)
        except FreshrankError as error:
            self.log.error("run %s could not be cancelled: %s; do it at %s", self.run_id, error, run_page(self.run_id))
            return
        self.log.info("run %s %s", self.run_id, "is cancelled" if cancelled else "had ended already")

    async def _task_state(self) -> str | None:
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        task: Any = self.task_instance
        states: Mapping[str, Mapping[str, Any]] = await asyncio.to_thread(
            RuntimeTaskInstance.get_task_states,
            dag_id=task.dag_id,
            task_ids=[task.task_id],
            run_ids=[task.run_id],
            map_index=task.map_index,
        )
        name = task.task_id if task.map_index < 0 else f"{task.task_id}_{task.map_index}"
        state = states.get(task.run_id, {}).get(name)
        return None if state is None else str(getattr(state, "value", state))
