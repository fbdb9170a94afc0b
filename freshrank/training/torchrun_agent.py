"""The torchrun agent of one node of a distributed training; a lost node can be replaced by a new one.

python -m freshrank.training.torchrun_agent ARGUMENTS OF TORCHRUN

Its last line on stderr says in a sentence why it ended, for whoever reads the tail of the pod's log.
"""

import os
import sys

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Otherwise agents that stay keep the address of the workers' store from the first round on, and a new one waits for it
until it ends with the rest."""


def main(arguments: list[str]) -> None:
    """Raises SystemExit where the training failed, or where nodes stayed away."""
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import api

    os.environ.setdefault(OWN_STORE, "1")
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"training failed: the worker of rank {rank} ended with code {failure.exitcode}; its log is above")
    except api.RendezvousTimeoutError:
        sys.exit(
            "training ended: not all nodes were there within join_timeout (FRESHRANK_TRAIN_CONNECT_SECONDS); "
            "started again, it goes on from the checkpoint"
        )
    except (api.RendezvousError, DistError) as error:
        sys.exit(
            f"training ended: the node that holds the others together is gone ({type(error).__name__}); started "
            "again, it goes on from the checkpoint"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
