#!/usr/bin/env bash
# The seeded crash tests for long. ROUNDS scales it; each part prints its seed.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${GO:=go}" "${ROUNDS:=50}" "${SEED:=$((RANDOM * 32768 + RANDOM))}"
echo "=== soak of $ROUNDS rounds, SEED=$SEED"
echo "=== spool: crashes of a fake disk"
SPOOL_SEEDS=$((ROUNDS * 4000)) $GO test -count=1 -timeout 0 -v -run Crash ./replica/spool
ROUNDS=$(((ROUNDS + 4) / 5)) SEED=$SEED scripts/ext4-soak.sh
echo "=== two sites: random faults, then the loss of one"
$GO run ./tests/e2e/soak -kagami bin/kagami -rounds "$ROUNDS" -seed "$SEED"
