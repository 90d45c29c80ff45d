#!/usr/bin/env bash
# Three generations of RoBERTa, BASE -> BASE_PLUS -> LARGE, and the six arms they are compared with (Figure 2b).
#   launchers/chain_roberta_g1_g2_g3.sh --scale tiny                       on two CPU cores
#   launchers/chain_roberta_g1_g2_g3.sh --data WB=CORPUS --hostfile hosts --parallel 2
#   ... --dry_run    the plan and its cost;  ... --no_baselines    G1, G1->G2 and G1->G2->G3 alone
exec bash "$(dirname "$0")/reproduce.sh" fig2b "$@"
