"""One process of a training on several nodes, as ``torchrun`` starts it in a TrainJob's pod.

python -m freshrank.training.torchrun_agent ... -m freshrank.pipeline.train_worker REQUEST

REQUEST is a JSON object: the arguments of :func:`freshrank.pipeline.steps.train` but for ``out``, each section of
the config as JSON in a string. What is learned stays in the step store of the shared workspace, where the step that
asked for it finds it.
"""

import json
import logging
import sys
from tempfile import TemporaryDirectory

from freshrank.config import parse_sections
from freshrank.errors import FreshrankError


def main(request: str) -> None:
    from freshrank.pipeline import steps

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with TemporaryDirectory() as out:
        steps.train(**parse_sections(json.loads(request)), out=f"{out}/ranker")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except FreshrankError as error:
        # Last of all in the pod's log, which is what the step that waits repeats.
        sys.exit(f"{type(error).__name__}: {error}")
