"""Stage 3, plan packing: lengths -> which example goes into which row, and the batches read by it.

From outside: `build.plan_rows`; `reader.open_plan` and `order`, which training reads rows with.
"""
