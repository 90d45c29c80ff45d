#!/usr/bin/env bash
''':'
# Train a language model, alone or inheriting from a smaller one. bash and Python both read this file, so that
#
#   deepspeed launchers/train_ki.sh                          the demo's inheriting run, resumed or fresh
#   deepspeed --num_gpus 2 launchers/train_ki.sh --config launchers/recipes/NAME.yaml --optim.lr 3e-4
#   [KI_DS_ARGS="--num_gpus 2"] bash launchers/train_ki.sh ...
#   torchrun --nproc_per_node 2 launchers/train_ki.sh ...    mpirun -n 2 bash launchers/train_ki.sh ...
#
# all start the same program. `--help` explains every field.
# --- read by bash only (to Python this is one long string) ---
case " $* " in *" --help "* | *" -h "* | *" --print_config"*) alone=yes ;; *) alone= ;; esac
started="${RANK:+${WORLD_SIZE:-}}${OMPI_COMM_WORLD_RANK:-}${SLURM_PROCID:+${SLURM_STEP_NUM_TASKS:-}}"
if [ -n "$alone$started" ]; then
    exec "${PYTHON:-python3}" -u "$0" "$@"        # a launcher has started this rank already
fi
exec deepspeed ${KI_DS_ARGS:-} "$0" "$@"
exit 127
: <<'pass'
'''
# --- read by Python only ---
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
DEMO = [os.path.join(ROOT, "launchers", "recipes", name) for name in ("demo_mlm.yaml", "demo_mlm_inherit.yaml")]

if __name__ == "__main__":
    # DeepSpeed's launcher adds --local_rank=N; openmpi, slurm and torchrun say it in the environment.
    arguments = []
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name.replace("-", "_") == "__local_rank":
            os.environ.setdefault("LOCAL_RANK", value)
        else:
            arguments.append(argument)

    from ki_ds.train import main

    sys.exit(main(arguments or [part for recipe in DEMO for part in ("--config", recipe)]))
pass
