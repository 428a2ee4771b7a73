"""Prefect tasks, one module a stage: call, report, hand the result on."""
