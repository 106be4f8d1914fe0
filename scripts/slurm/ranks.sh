# What the batch scripts of this folder have in common; each of them reads it with `source`.
#
#     need NAME MEANING   refuses to go on without the variable NAME
#     need_file NAME MEANING   and without the file or directory that it names
#     divide NAME         the tasks over $NAME of them, which must go evenly
#     ranks COMMAND…      runs `mpishard COMMAND…` on all tasks of the job
#
# Variables of the environment:
#     MPISHARD        the command: mpishard on the PATH, unless told otherwise, for example
#                     /project/venv/bin/mpishard
#     SLURM_MPI_TYPE  how Slurm's srun and MPI find each other: pmi2, for MPICH; `srun --mpi=list`
#                     says what else there is, for example pmix, for Open MPI
# Ranks, threads and cores are those of the allocation: sbatch's --ntasks and --cpus-per-task.
# shellcheck shell=bash

set -euo pipefail

die() { # die SENTENCE: end the job as mpishard does after a wrong call
    echo "${SLURM_JOB_NAME:-mpishard}: error: $*" >&2
    exit 2
}

need() {
    [[ -n ${!1:-} ]] || die "$1 is not set: give $2, as in \`$1=… sbatch …\`"
}

need_file() {
    need "$@"
    [[ -e ${!1} ]] || die "$1=${!1} does not exist on $(hostname): give $2"
}

divide() {
    local size=${!1}
    [[ $size =~ ^[1-9][0-9]*$ ]] || die "$1=$size is not a number of ranks: 1 or more"
    ((SLURM_NTASKS % size == 0)) ||
        die "$SLURM_NTASKS tasks cannot be divided by $1=$size:" \
            "give a divisor, or another \`sbatch --ntasks\`"
    echo $((SLURM_NTASKS / size))
}

ranks() {
    local command threads=${SLURM_CPUS_PER_TASK:-1}
    read -ra command <<<"${MPISHARD:-mpishard}"
    command -v "${command[0]}" >/dev/null ||
        die "${command[0]} is not on the PATH of $(hostname): MPISHARD=/path/to/mpishard sbatch …"
    # A batch is told to stop by these signals: before it listens they would kill it, and are held
    # back, where env can (GNU coreutils 8.31).
    if [[ $1 == batch ]] && env --block-signal=TERM,USR1 true 2>/dev/null; then
        command=(env --block-signal=TERM,USR1 "${command[@]}")
    fi
    export OPENBLAS_NUM_THREADS=$threads OMP_NUM_THREADS=$threads
    export SRUN_CPUS_PER_TASK=$threads # srun does not take this over from sbatch since Slurm 22.05
    export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-pmi2}
    # MPICH's ranks tell each other their addresses through Slurm, whose pmi2 (22.05) has been seen
    # to damage those of UCX ("value not properly terminated"), so that ranks fail or hang.
    export MPIR_CVAR_CH4_NETMOD=${MPIR_CVAR_CH4_NETMOD:-ofi}
    echo "$SLURM_JOB_NAME: $SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES nodes" \
        "($SLURM_JOB_NODELIST), $threads threads each" >&2
    # Neighbouring ranks talk most, so a node is filled before the next. Ranks that wait for one
    # that was killed are ended after some seconds; not at once, by --kill-on-bad-exit: of ranks
    # that end together with a status of their own the first would have the last ones killed, and
    # the status would be that of the kill.
    srun --distribution=block --cpu-bind=cores --kill-on-bad-exit=0 --wait=10 --input=0 \
        "${command[@]}" "$@"
}

[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a batch script: hand it to sbatch"
[[ -n ${SLURM_NTASKS:-} ]] ||
    die "Slurm does not say how many ranks to start: give \`sbatch --ntasks\`"
# How many tasks each node has, where all have as many; tensor parallelism stays within a node.
per_node=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
((per_node * SLURM_JOB_NUM_NODES == SLURM_NTASKS)) ||
    die "$SLURM_NTASKS tasks are not as many on each of $SLURM_JOB_NUM_NODES nodes:" \
        "give \`sbatch --ntasks-per-node\`"
