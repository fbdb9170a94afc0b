"""The graph of the daily pipeline; the same one runs in local subprocesses and on a cluster."""

from collections.abc import Callable

from kfp import dsl

from freshrank.components import tasks

NAME = "train-ranker"


def build(place: Callable[[dsl.PipelineTask], object]) -> dsl.base_component.BaseComponent:
    """The pipeline ``train_ranker``; ``place`` is told every task and may say where it runs, not what it does."""

    @dsl.pipeline(  # type: ignore[untyped-decorator]
        name=NAME, description="Validate, train, calibrate, judge; deploy only what is blessed."
    )
    def train_ranker(
        data: str,
        run_date: str,
        data_version: str,
        windows: str,
        validation: str,
        model: str,
        techniques: str,
        training: str,
        calibration: str,
        evaluation: str,
        gate: str,
    ) -> str:
        log = {"data": data, "run_date": run_date}
        checked = tasks.validate_data(**log, data_version=data_version, validation=validation)
        trained = tasks.train(
            **log,
            data_version=data_version,
            windows=windows,
            model=model,
            techniques=techniques,
            training=training,
        ).after(checked)
        calibrated = tasks.calibrate(**log, windows=windows, calibration=calibration, ranker=trained.outputs["ranker"])
        bundle = calibrated.outputs["bundle"]
        judged = tasks.evaluate(**log, windows=windows, evaluation=evaluation, gate=gate, bundle=bundle)
        verdict, evidence = judged.outputs["Output"], judged.outputs["evidence"]
        with dsl.If(verdict == "blessed", name="blessed"):
            deployed = tasks.deploy(**log, bundle=bundle, evidence=evidence)
        with dsl.Else(name="not-blessed"):
            stopped = tasks.stop(**log, evidence=evidence)
        # The verdict depends on the serving model and the last two act on the world: a cached answer would be a lie.
        for task in (judged, deployed, stopped):
            task.set_caching_options(False)
        for task in (checked, trained, calibrated, judged, deployed, stopped):
            task.set_env_variable("PYTHONUNBUFFERED", "1")
            place(task)
        return verdict  # type: ignore[no-any-return]

    return train_ranker
