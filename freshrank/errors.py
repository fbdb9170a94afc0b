"""Every error a user can meet, with the exit code the command line gives it.

FreshrankError (1)
├── ConfigError (2)        a setting, recipe or schema.yaml is wrong
├── DataError (3)          the log, the items or the users break the contract
├── ValidationFailed (4)   the day's data was read but must not be trained on
├── ServingError (5)       Triton or the model repository refused
│   ├── ServerUnreachable (5)  no Triton answers there
│   └── NoAnswerInTime (5)     it took a call and has not answered it
├── MissingArtifact (6)    a step was asked for before the one it needs
├── PipelineFailed (7)     the Kubeflow pipeline or one of its steps failed
│   └── ClusterUnreachable (7)  no Kubeflow Pipelines API answers; a run that goes on goes on
└── StorageError (8)       the object store refuses, is unreachable, or holds corrupt data
"""


class FreshrankError(Exception):
    """Base of all errors the user can fix; its text is printed without a traceback."""

    exit_code = 1


class ConfigError(FreshrankError):
    """A setting, a recipe or ``schema.yaml`` names something that cannot be."""

    exit_code = 2


class DataError(FreshrankError):
    """A table breaks the data contract."""

    exit_code = 3


class ValidationFailed(FreshrankError):
    """The day's data is readable but a blocking expectation failed."""

    exit_code = 4


class ServingError(FreshrankError):
    """Triton, the model repository or the online store refused; the served version is unchanged."""

    exit_code = 5


class ServerUnreachable(ServingError):
    """No Triton answers, or it died during the call; the request itself is not at fault."""


class NoAnswerInTime(ServingError):
    """A Triton accepted a call and did not answer within the timeout."""


class MissingArtifact(FreshrankError):
    """A step needs the output of one that has not run."""

    exit_code = 6


class PipelineFailed(FreshrankError):
    """The pipeline, or one of its steps, failed."""

    exit_code = 7


class ClusterUnreachable(PipelineFailed):
    """The Kubeflow Pipelines API does not answer, or is overloaded; what it was asked to do may have been done."""


class StorageError(FreshrankError):
    """The object store refuses, does not answer, or holds something broken; what it held before is unchanged."""

    exit_code = 8
