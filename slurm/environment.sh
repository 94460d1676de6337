# Sourced by the jobs of this folder, which are submitted from the clone: the interpreter, threads, where processes meet, logs by rank.
cd "$SLURM_SUBMIT_DIR"
PY=${PY:-.venv/bin/python}
[ -x "$(command -v "$PY")" ] || { echo "error: no Python at '$PY': run make setup, or submit with PY=/path/to/python" >&2; exit 2; }
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take sbatch's by itself
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# The address that Slurm itself uses: a node's name need not resolve
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
LOGS=${LOGS:-slurm-logs}/$SLURM_JOB_NAME-$job
mkdir -p "$LOGS"

# run COMMAND...: in each task, to its own log. Status 75 (eqldm saved and stopped) or 138 (SIGUSR1 came before it could listen) means
# that time was up: the job is requeued. A job that is being cancelled, or is requeued already, is not RUNNING any more: it is left.
run() {
    local status state
    echo "start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, logs in $LOGS"
    # A task that ends leaves the others a minute (WAIT): told to stop, they save together; after a crash they would wait for ever
    srun --kill-on-bad-exit=0 --wait="${WAIT:-60}" --open-mode=append --output="$LOGS/%t.log" "$PY" "$@"
    status=$?
    if [ $status -eq 75 ] || [ $status -eq 138 ]; then
        state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
        echo "stopped to go on later; the job is $state"
        [ "$state" != RUNNING ] || scontrol requeue "$SLURM_JOB_ID"
    elif [ $status -eq 3 ]; then
        echo "done, but not all could be computed: the report says what, and how to get it"
    elif [ $status -ne 0 ]; then
        echo "error: a task failed (status $status). What was saved is kept: submit the same job again to go on. The last lines:"
        tail -n 5 "$LOGS"/*.log
    fi
    return $status
}
