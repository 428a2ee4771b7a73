#!/bin/bash
# A Prefect worker inside a SLURM allocation: runs one run that is due, and ends with it.
# `sbatch deploy/slurm/worker.sh` in the project's directory, by hand or from cron a minute after a schedule. Two minutes
# before the time limit the run is told to stop: it writes a checkpoint, and the next run goes on from it.
#SBATCH --job-name=panda-worker
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -uo pipefail
: "${PREFECT_API_URL:?is the address of the Prefect server, reachable from the nodes}"

prefect worker start --pool "${PANDA_POOL:-panda}" --type process --limit 1 --run-once &
worker=$!
trap 'pkill -TERM -P "$worker"' TERM  # its run, not the worker: that one would kill the run at once
until wait "$worker" || ! kill -0 "$worker" 2> /dev/null; do :; done
