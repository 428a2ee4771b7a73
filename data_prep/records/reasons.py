"""Why a record was not used: the closed set of reasons, the only words the ledger, the reports and `panda why` say.

*rejected* = the record is unusable as it stands (its bytes are kept in the unit's quarantine file);
*dropped* = the record is sound and a setting leaves it out. Both have a ledger line. Cost: none, constants.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a record was rejected or dropped; `Reason(...).explanation` is the sentence people read."""

    explanation: str

    def __new__(cls, value: str, explanation: str) -> "Reason":
        member = str.__new__(cls, value)
        member._value_ = value
        member.explanation = explanation
        return member

    # Rejected while reading.
    MALFORMED_JSON = "malformed_json", "not valid JSON (NaN, Infinity and lone surrogates are not JSON either)"
    TRUNCATED_FILE = "truncated_file", "the file or its compressed stream ends here although more was announced"
    INVALID_UTF8 = "invalid_utf8", "the bytes are not UTF-8"
    OVERSIZED_RECORD = "oversized_record", "the record has more than 64 MiB"
    UNKNOWN_SHAPE = "unknown_shape", "none of the documented record shapes fits (in this directory)"
    MISSING_FIELD = "missing_field", "a field that this record shape needs is absent or null"
    WRONG_TYPE = "wrong_type", "a field has another type than this record shape says"
    EMPTY_TARGET = "empty_target", "nothing to learn: a target, answer or document is empty or only white space"
    # Rejected while tokenizing.
    NO_TARGET_TOKENS = "no_target_tokens", "after tokenizing, no token of the record contributes to the loss"
    # Dropped while planning.
    DUPLICATE = "duplicate", "an earlier record has the same content"
    NEAR_DUPLICATE = "near_duplicate", "an earlier record has nearly the same content (MinHash)"
    TOO_LONG = "too_long", "longer than max_seq_length, and overflow says to drop such records"
    NOT_SAMPLED = "not_sampled", "the mixture weight of its source leaves it out"
    TAKEN_DOWN = "taken_down", "it has a tombstone (`panda takedown`)"
    NOT_REPLAYED = "not_replayed", "an earlier model was trained on it, and replay_share leaves it out"
    # Rejected; later in the order, because the number of a reason stands in ledgers.
    MALFORMED_ROW = "malformed_row", "a CSV row with other than the header's number of cells, or a stray quote"
    UNSUPPORTED_FIELD = (
        "unsupported_field",
        "a field that asks for what is not done here, or (strict_fields) is unknown",
    )
    UNSUPPORTED_WEIGHT = "unsupported_weight", "a turn's weight is not 0 or 1, or asks to train what is no answer"
    TEMPLATE_REFUSED = "template_refused", "the template cannot express the record, or its answers cannot be found"
    QUARANTINED = "quarantined", "an earlier training named it as the cause of a spike (`quarantine`)"


REJECTED = frozenset(
    {
        Reason.MALFORMED_JSON,
        Reason.TRUNCATED_FILE,
        Reason.INVALID_UTF8,
        Reason.OVERSIZED_RECORD,
        Reason.UNKNOWN_SHAPE,
        Reason.MISSING_FIELD,
        Reason.WRONG_TYPE,
        Reason.EMPTY_TARGET,
        Reason.MALFORMED_ROW,
        Reason.NO_TARGET_TOKENS,
        Reason.UNSUPPORTED_FIELD,
        Reason.UNSUPPORTED_WEIGHT,
        Reason.TEMPLATE_REFUSED,
    }
)
