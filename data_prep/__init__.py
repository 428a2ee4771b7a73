"""From JSON corpora to packed training rows: pure functions over files, no torch, no Prefect, no MLflow.

A record goes `records` -> `tokens` -> `plan`; `inspection` shows what was made. `pipeline` runs all three.
"""
