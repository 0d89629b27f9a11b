#!/usr/bin/env bash
# Runs every fuzz target for FUZZTIME, one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${GO:=go}" "${FUZZTIME:=30s}"
n=0
for pkg in $($GO list ./...); do
	for target in $($GO test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
		echo "=== $pkg $target, $FUZZTIME"
		$GO test -run '^$' -fuzz "^$target\$" -fuzztime "$FUZZTIME" "$pkg"
		n=$((n + 1))
	done
done
echo "=== $n fuzz targets found nothing"
[ "$n" -gt 0 ]
