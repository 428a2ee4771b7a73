"""The tags of runs, logged models and versions in MLflow: all their names.

In: nothing. Out: names for whoever sets or reads a tag. Runs and versions of earlier code have these names, so they
never change; one that ends in a dot is followed by what it is about. Cost: none.
"""

RUN_DIR_TAG = "panda.run_dir"
RUN_TOKEN_TAG = "panda.run_token"  # ours, to find a run whose creation was answered to nobody
CODE_CHANGED_TAG = "panda.code_changed"  # since the commit: true or false

CORPUS_TAG = "panda.corpus"  # fingerprint of the records
PLAN_TAG = "panda.plan"  # fingerprint of the plan
CONFIG_TAG = "panda.config"  # hash of the settings
TARGET_TOKENS_TAG = "panda.target_tokens"  # of the corpus
EVAL_LOSS_TAG = "eval_loss."  # + source of the held-out records, or `all`

STOPPED_TAG = "panda.stopped"  # why training ended before all its steps were done; empty where they were

CHECKPOINT_TAG = "panda.checkpoint"  # of a logged model: the directory of the checkpoint
KEY_TAG = "panda.key"  # what is registered: hash of the run and the step
STEP_TAG = "panda.step"  # optimizer steps behind the weights; versions of earlier code have none

PARENT_TAG = "panda.parent"  # the version whose weights this one started from
GATE_TAG = "panda.gate"  # passed, or failed; written last
REASONS_TAG = "panda.gate.reasons"
GAIN_TAG = "panda.gate.gain"
APPROVAL_TAG = "panda.approval"  # waiting, approved, refused, or no answer; none where nobody was asked
COMMENT_TAG = "panda.approval.comment"
REPLACED_TAG = "panda.replaced_champion"  # the version that was champion before this one
PROMOTED_BY_HAND_TAG = "panda.promoted_by_hand"  # when
ROLLED_BACK_TAG = "panda.rolled_back"  # when
WEIGHTS_FREED_TAG = "panda.weights_freed"  # when; such a version is there for its lineage alone
TAKEDOWN_TAG = "panda.takedown."  # + content hash
BENCHMARK_TAG = "panda.benchmark."  # + task of lm-eval

FLOW_RUN_TAG, FLOW_RUN_URL_TAG = "prefect.flow_run_id", "prefect.flow_run_url"

# MLflow's own
USER_TAG = "mlflow.user"
SOURCE_NAME_TAG, SOURCE_TYPE_TAG = "mlflow.source.name", "mlflow.source.type"
COMMIT_TAG = "mlflow.source.git.commit"
NOTE_TAG = "mlflow.note.content"  # the description of a run
KIND_TAG = "mlflow.experimentKind"


def tagged(tags: dict[str, str], prefix: str) -> dict[str, str]:
    """What the tags that begin so are about -> their values."""
    return {name.removeprefix(prefix): value for name, value in tags.items() if name.startswith(prefix)}
