#!/bin/sh
# Installs the Debian packages of packages.txt that are missing, and checks Go.
# Does nothing, quickly, when nothing is missing.
set -eu
cd "$(dirname "$0")"

fail() { echo "deps: $*" >&2; exit 1; }

want=1.26
command -v go >/dev/null || fail "Go is missing: install Go $want or newer, see https://go.dev/doc/install"
have=$(cd / && GOTOOLCHAIN=local go env GOVERSION | sed 's/^go//')
oldest=$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n 1)
[ "$oldest" = "$want" ] || fail "Go $have is too old: install Go $want or newer, see https://go.dev/doc/install"

command -v dpkg-query >/dev/null || fail "this is no Debian system: install what scripts/packages.txt lists by hand, then use make DEPS=no …"
packages=$(sed -e 's/#.*//' packages.txt)
missing=
for p in $packages; do
	case $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true) in
	installed) ;;
	*) missing="$missing $p" ;;
	esac
done
[ -n "$missing" ] || exit 0

echo "deps: installing$missing"
root=
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || fail "not root and no sudo: install$missing, then run make again"
	root=sudo
fi
install() {
	# shellcheck disable=SC2086 # a list of words
	$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
		-o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 $missing </dev/null
}
$root apt-get update -q -o DPkg::Lock::Timeout=300
install || fail "apt-get could not install$missing"
