#!/usr/bin/env bash
# A run on Slurm: a Ray node on every node of the allocation, the driver on the first.
#
#   sbatch cluster/deploy/slurm.sh config.yaml [section.key=value …]
#
# Before the time limit, or when a node is taken back, the run stops cleanly, and the requeued job resumes it. Set what
# your site needs below, or on sbatch's command line, which has precedence.

#SBATCH --job-name=flashu
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=flashu-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@180

set -euo pipefail
# FILL IN: whatever puts `flashu` and `ray` on the PATH of every node, such as
# source "$HOME/flashu/.venv/bin/activate"

if [ $# -lt 1 ]; then
    echo "slurm.sh: name a config: sbatch slurm.sh config.yaml [section.key=value …]" >&2
    exit 2
fi

# Whoever reaches Ray's port could run code as you, so Ray asks for a token: yours, if you have set RAY_AUTH_TOKEN or
# RAY_AUTH_TOKEN_PATH, and else one that is made here for this job. It travels in the environment, which nobody else may
# read, and stands on no command line and in no file. RAY_AUTH_MODE=disabled does without.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
    RAY_AUTH_TOKEN=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')
    export RAY_AUTH_TOKEN
fi

gpus=${SLURM_GPUS_ON_NODE:-0}
cpus=${SLURM_CPUS_PER_TASK:-1}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=${FLASHU_HEAD_IP:-$(hostname -I | cut -d' ' -f1)} # set it where the first address is the wrong network
address=$head_ip:$((20000 + SLURM_JOB_ID % 10000))        # other jobs may share the node
start=(--num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats --block)

on_node() { # one step for each node: the loss of one ends no other; for the background only, as it does not return
    local node=$1
    shift
    exec srun --export=ALL --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --nodelist="$node" "$@"
}

on_node "${nodes[0]}" ray start --head --node-ip-address="$head_ip" --port="${address##*:}" \
    --include-dashboard=false "${start[@]}" &
head=$!
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

for ((waited = 0; ; waited++)); do
    if said=$(ray status --address "$address" 2>&1); then
        break
    elif [[ $said == *InvalidAuthToken* || $said == *AuthenticationError* ]]; then
        echo "slurm.sh: the Ray at $address has another token than this job: another job's, on the same port?" >&2
        exit 1
    elif ! kill -0 $head 2>/dev/null || ((waited >= 120)); then
        echo "slurm.sh: Ray did not start on ${nodes[0]} at $address; it last said: ${said##*$'\n'}" >&2
        exit 1
    fi
    sleep 1
done
for node in "${nodes[@]:1}"; do
    on_node "$node" ray start --address="$address" "${start[@]}" &
done

settings=(cluster.address="$address")
if ((gpus > 0)); then # said here, as nodes may still be joining
    settings+=(cluster.gpus_per_worker=1 cluster.workers=$((gpus * ${#nodes[@]})))
fi
requeue=false driver=
# From scancel, or from a preemption, which requeues by itself:
trap 'kill -TERM $driver 2>/dev/null || true' TERM
# The time is nearly up. The run gets two minutes to finish the shards in flight, then one to stop:
trap 'requeue=true; kill -INT $driver 2>/dev/null || true; (sleep 120; kill -TERM $driver) >/dev/null 2>&1 &' USR1
flashu run "$1" "${settings[@]}" "${@:2}" &
driver=$!
while kill -0 $driver 2>/dev/null; do # a signal ends `wait` before the driver has stopped
    wait $driver && status=0 || status=$?
done
if $requeue && ((status != 0)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
