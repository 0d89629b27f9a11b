#!/usr/bin/env bash
# Proves that the linter holds the package map: in a copy of the tree, each of
# these forbidden imports must be reported. A rule that no longer bites (a moved
# folder, a wrong pattern) fails here instead of staying unnoticed.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${GO:=go}"
lint=$($GO tool -modfile=tests/tools/go.mod -n golangci-lint)

# Folder and what it must not import. Together they make no import cycle.
violations="
appliance                kagami/images
appliance/config         kagami/appliance/control
appliance/control        kagami/tests/acked/stamp
appliance/host           github.com/spf13/viper
appliance/nbd            kagami/appliance/control
appliance/offline        kagami/appliance/control
appliance/pki            kagami/appliance/control
appliance/ship           kagami/appliance/control
ext4j                    kagami/appliance/control
ext4j/activelog          kagami/appliance/control
ext4j/backlog            kagami/appliance/control
ext4j/browse             kagami/images
ext4j/changemap          kagami/appliance/control
ext4j/check              kagami/images
ext4j/epoch              kagami/appliance/control
ext4j/follow             kagami/images
ext4j/jbd2               kagami/appliance/control
ext4j/recover            kagami/images
ext4j/ext4               kagami/appliance/control
images                   kagami/appliance/control
qmp                      kagami/images
replica                  kagami/appliance/control
replica/spool            kagami/appliance/control
replica/wire             github.com/spf13/viper
somewhere/new            kagami/images
"

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z -co --exclude-standard | tar --null --ignore-failed-read -T - -cf - 2>/dev/null | tar -xf - -C "$copy"

while read -r dir import; do
	[ -n "$dir" ] || continue
	mkdir -p "$copy/$dir"
	name=$(basename "$dir")
	[ "$dir" = appliance ] && name=main
	printf 'package %s\n\nimport _ "%s"\n' "$name" "$import" >"$copy/$dir/zz_violation.go"
done <<<"$violations"

cd "$copy"
report=$("$lint" run --enable-only depguard --output.text.print-issued-lines=false ./... 2>&1 || true)

missing=0
while read -r dir import; do
	[ -n "$dir" ] || continue
	if ! grep -q "^$dir/zz_violation.go:.*'$import'.*depguard" <<<"$report"; then
		echo "lint-proof: $dir may import $import, which the package map forbids" >&2
		missing=1
	fi
done <<<"$violations"
if [ $missing = 1 ]; then
	echo "$report" >&2
	exit 1
fi
echo "lint-proof: $(grep -c . <<<"$violations") forbidden imports, all reported"
