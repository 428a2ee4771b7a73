"""Errors of training that a user can cause and mend. In: nothing. Out: subclasses of `PandaError`. Cost: none."""

from data_prep.errors import PandaError


class CheckpointError(PandaError):
    """A checkpoint cannot be found, downloaded or used: names what was looked for, where, and what to do."""


class ModelError(PandaError):
    """The model cannot be loaded, does not fit the tokenizer, or cannot be trained as asked."""


class CompatibilityError(PandaError):
    """Settings that contradict each other or that no engine can run."""


class DeviceError(PandaError):
    """More ranks than GPUs on a machine."""


class MlflowAway(PandaError):
    """MLflow does not answer: what it is needed for can be done later, so trying again helps."""
