#!/usr/bin/env bash
# What is tried of ext4, in full: every stream and every mutant of the rules, crashes
# in every kind of file system. ROUNDS scales it; the seed is printed.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${GO:=go}" "${ROUNDS:=1}" "${SEED:=$((RANDOM * 32768 + RANDOM))}"
echo "=== ext4: $ROUNDS rounds, SEED=$SEED"
EXT4_SOAK=$ROUNDS EXT4_SEED=$SEED $GO test -count=1 -timeout 0 -v -run 'Rules|Cuts|Mutants' ./tests/ext4cap
EXT4_SOAK=$ROUNDS EXT4_SEED=$SEED $GO test -count=1 -timeout 0 -run 'Kernel' ./ext4j/recover
