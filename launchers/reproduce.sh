#!/usr/bin/env bash
# Run an experiment of the paper: launchers/reproduce.sh ID --scale tiny|one_gpu|paper [--seeds N]; see --help.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if ! python3 -c 'import torch, deepspeed, jsonargparse' 2>/dev/null; then # a bare machine: the pinned packages first
        [ -f "$here/.venv/.installed" ] || make -C "$here" install
        PYTHON="$here/.venv/bin/python"
    fi
fi
exec "$PYTHON" -u "$here/tools/reproduce.py" "$@"
