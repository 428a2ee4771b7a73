"""Stage 1, validate and shard: files of JSON -> records in normal form, a ledger line for each.

From outside: `shard.shard_records`; `reasons.Reason`; `normalise` for the roles of a record.
"""
