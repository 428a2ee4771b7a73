"""Stage 2, tokenize and mask: records -> examples, ids and which of them are targets.

From outside: `tokenize.tokenize_records`, `tokenizer.load_tokenizer`; `token_shard` is the file that the plan maps.
"""
