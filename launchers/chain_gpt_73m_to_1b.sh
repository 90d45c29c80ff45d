#!/usr/bin/env bash
# GPT in five links, 73M -> 124M -> 209M -> 354M -> 773M -> 1B, each model taught by the one before (Figure 2a).
#   launchers/chain_gpt_73m_to_1b.sh --scale tiny                 on two CPU cores
#   launchers/chain_gpt_73m_to_1b.sh --baselines --data WB=CORPUS --hostfile hosts
#   ... --baselines    every size trained alone as well;  ... --dry_run    the plan and its cost
baselines=--no_baselines
arguments=()
for argument in "$@"; do
    if [ "$argument" = --baselines ]; then baselines=; else arguments+=("$argument"); fi
done
exec bash "$(dirname "$0")/reproduce.sh" fig2a $baselines "${arguments[@]}"
