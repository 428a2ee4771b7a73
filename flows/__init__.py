"""The Prefect flows: order, retries and what a schedule means. `parts` is what they share, `cli` the verbs of `panda`,
`stack` the servers and the worker.
"""
