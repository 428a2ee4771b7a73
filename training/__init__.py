"""From packed rows to a registered model. Never imports Prefect.

`worker`, `evaluate` and `compare` are processes. `trainer`, `engines`, `models`, `bases`, `planning` and `launch`
train; `tracking`, `registry`, `comparison` and `export` work on what was trained, and the former never import them.
"""
