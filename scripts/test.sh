#!/usr/bin/env bash
# Everything `make test` runs, with a closing summary. A step that fails does
# not keep the others from running, so that one run shows all that is wrong.
set -uo pipefail
cd "$(dirname "$0")/.."

: "${GO:=go}"
results=()
failed=0
began=$SECONDS

step() {
	local name=$1 start=$SECONDS
	shift
	echo "=== $name"
	if "$@"; then
		results+=("$(printf 'ok    %5ds  %s' $((SECONDS - start)) "$name")")
	else
		results+=("$(printf 'FAIL  %5ds  %s' $((SECONDS - start)) "$name")")
		failed=1
	fi
}

tests() { # flags… packages…
	$GO test -json "$@" 2>&1 | bin/testsummary
}

unit() {
	local packages
	packages=$($GO list ./... | grep -v '/tests/e2e') || return 1
	# shellcheck disable=SC2086 # a list of words
	tests -race -timeout 30m $packages
}

# Packages whose crash tests, simulations and outages play fewer seeds, or in fewer
# ways, under the race detector: here all. They say so by a file norace_test.go.
seeds() {
	local packages
	packages=$(find . -name norace_test.go -printf '%h\n' | sort) || return 1
	# shellcheck disable=SC2086
	tests -timeout 30m -run 'Crash|Seeds|Mutants|Scripts|Corrupted|Continue$|BacklogGivenUp|NoSpaceForState' $packages
}

# The VMs of the end-to-end tests need the machine for themselves; they run a
# daemon built like the real one, and their results are never taken from a cache.
e2e() {
	local packages
	packages=$($GO list ./tests/e2e/...) || return 1
	# shellcheck disable=SC2086
	tests -count=1 -p 1 -timeout 20m $packages
}

summary() { $GO build -o bin/testsummary ./scripts/testsummary; }

step "build" make --no-print-directory build DEPS=no
step "build of the test summary" summary
step "lint" make --no-print-directory lint DEPS=no
step "unit tests, with the race detector" unit
step "crash tests, all seeds" seeds
step "end-to-end tests" e2e

echo
echo "=== summary of make test, $((SECONDS - began)) s"
printf '%s\n' "${results[@]}"
exit $failed
