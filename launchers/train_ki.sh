#!/usr/bin/env bash
''':'
# Train a language model, alone or inheriting from a smaller one.
# bash and Python both read this file, so that
#
#   deepspeed launchers/train_ki.sh                          the demo's inheriting run, resumed or fresh
#   deepspeed --num_gpus 2 launchers/train_ki.sh --config launchers/recipes/NAME.yaml --optim.lr 3e-4
#   [KI_DS_ARGS="--num_gpus 2"] bash launchers/train_ki.sh ...
#   torchrun --nproc_per_node 2 launchers/train_ki.sh ...    mpirun -n 2 bash launchers/train_ki.sh ...
#   bash launchers/train_ki.sh --max_restarts 3 ...          started again from its last checkpoint when it fails
#   bash launchers/train_ki.sh --dry_run --num_gpus 8 ...    what it will need, before anything is trained
#
# all start the same program. `--help` explains every field.
# --- read by bash only (to Python this is one long string) ---
case " $* " in
    *" --max_restarts"* | *" --dry_run "* | *" --help "* | *" -h "* | *" --print_config"*) alone=yes ;;
    *) alone= ;;
esac
# as ki_ds/ranks/environment.py tells a rank; a Slurm step of one task, e.g. an interactive shell, starts ranks
started="${RANK:+${WORLD_SIZE:-}}${OMPI_COMM_WORLD_RANK:-}${MV2_COMM_WORLD_RANK:-}"
started="$started${PMI_RANK:+${MPI_LOCALNRANKS:-}${PMI_LOCAL_SIZE:-}}"
[ -z "${SLURM_PROCID:-}" ] || [ "${SLURM_STEP_NUM_TASKS:-1}" = 1 ] || started=srun
# over pdsh: ssh itself never notices that a host is gone, and the job would never end
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND--o ServerAliveInterval=15 -o ServerAliveCountMax=4}"
if [ -n "$alone$started" ]; then
    exec "${PYTHON:-python3}" -u "$0" "$@"        # a launcher has started this rank already
fi
options=${KI_DS_ARGS:-}
unset KI_DS_ARGS                                  # they are for deepspeed, not for its ranks
exec deepspeed ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${MASTER_PORT:+--master_port "$MASTER_PORT"} \
    $options "$0" "$@"
exit 127
: <<'pass'
'''
# --- read by Python only ---
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from ki_ds.cli import main

    main(sys.argv[1:])
pass
