#!/bin/bash
# A run on nodes that Slurm lends, on a Ray cluster of its own: sbatch slurm.sh my.yaml runs_dir=/shared/runs
# A minute before its time is over the job puts itself into the queue again, and resumes from the newest checkpoint.
#SBATCH --job-name=alignyard
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# The environment that `make setup EXTRA=gpu` made, on storage that all nodes share.
export PATH="${ALIGNYARD:-/shared/alignyard}/.venv/bin:$PATH"
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="${hosts[0]}")
read -r head _ < <("${on_head[@]}" hostname --ip-address)

"${on_head[@]}" ray start --head --node-ip-address="$head" --port=6379 \
  --dashboard-host="$head" --dashboard-port=8265 --disable-usage-stats --block &
alive() {
  "${on_head[@]}" python -c '
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]))' "$head:6379" "$1" 2>/dev/null
}
until alive 1; do sleep 2; done
if ((SLURM_JOB_NUM_NODES > 1)); then
  srun --overlap --nodes="$((SLURM_JOB_NUM_NODES - 1))" --ntasks="$((SLURM_JOB_NUM_NODES - 1))" \
    --exclude="${hosts[0]}" ray start --address="$head:6379" --disable-usage-stats --block &
fi
until alive "$SLURM_JOB_NUM_NODES"; do sleep 2; done

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
alignyard run "$@" --address "http://$head:8265" &
wait "$!"
