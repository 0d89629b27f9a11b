#!/usr/bin/env bash
# Fetches the source package of e2fsprogs and makes the images of its own tests, into
# build/e2fsprogs:
#   j/NAME.img (NAME.img.jnl)                 its journal recovery tests, before recovery
#   f/NAME.img.gz                             its corrupted file systems
# Does nothing when they are there. Nothing of it is committed. apt works in a root of
# its own, so the machine's configuration stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

out=$PWD/build/e2fsprogs
mkdir -p build
exec 9>build/e2fsprogs.lock
flock 9
[ ! -e "$out/complete" ] || exit 0
rm -rf "$out"
mkdir -p "$out/src" "$out/run" "$out/j" "$out/f"

fetch() {
	local root=$out/apt keys=/usr/share/keyrings/debian-archive-keyring.gpg
	mkdir -p "$root"/etc/apt/{preferences.d,apt.conf.d,trusted.gpg.d} "$root"/var/lib/apt/lists/partial "$root"/var/cache/apt/archives/partial "$root"/var/lib/dpkg
	: >"$root/var/lib/dpkg/status"
	# shellcheck source=/dev/null
	. /etc/os-release
	echo "deb-src [signed-by=$keys] http://deb.debian.org/debian $VERSION_CODENAME main" >"$root/etc/apt/sources.list"
	local apt=(apt-get -q -o "Dir=$root" -o "Dir::State::status=$root/var/lib/dpkg/status" -o APT::Sandbox::User=root)
	(cd "$out/src" && "${apt[@]}" update && "${apt[@]}" source --download-only e2fsprogs) >"$out/fetch.log" 2>&1 || {
		cat "$out/fetch.log" >&2
		echo "ext4-vectors: cannot fetch the source package of e2fsprogs" >&2
		return 1
	}
	tar -xzf "$out"/src/e2fsprogs_*.orig.tar.gz -C "$out/src"
}

# build runs the package's own test, which leaves the image it made where
# JOURNAL_DUMP_DIR says; with the system's programs in place of those of its tree.
build() {
	local tests=$1 name=$2
	(cd "$out/run" && JOURNAL_DUMP_DIR=$out/j SRCDIR=$tests TEST_CONFIG=$out/run/config TMPDIR=$out/run \
		timeout 120 bash "$tests/test_one.in" "$tests/$name") >>"$out/build.log" 2>&1 </dev/null || true
}

fetch
tests=$(echo "$out"/src/e2fsprogs-*/tests)
sed -E 's#\.\./(e2fsck|misc|debugfs|resize)/([a-z0-9]+)#/usr/sbin/\2#g' "$tests/test_config" >"$out/run/config"
cp "$tests/mke2fs.conf.in" "$out/run/mke2fs.conf"
for dir in "$tests"/j_*; do
	name=$(basename "$dir")
	if [ -f "$dir/image.gz" ]; then
		gunzip -c "$dir/image.gz" | cp --sparse=always /dev/stdin "$out/j/$name.img"
	elif [ -f "$dir/image.bz2" ]; then
		bunzip2 -c "$dir/image.bz2" | cp --sparse=always /dev/stdin "$out/j/$name.img"
	else
		build "$tests" "$name"
	fi
done
for dir in "$tests"/f_*; do
	name=$(basename "$dir")
	if [ -f "$dir/image.gz" ]; then
		cp "$dir/image.gz" "$out/f/$name.img.gz"
	elif [ -f "$dir/image.bz2" ]; then
		bunzip2 -c "$dir/image.bz2" | gzip >"$out/f/$name.img.gz"
	fi
done
rm -rf "$out/apt" "$out/run" "$out/src"
touch "$out/complete"
