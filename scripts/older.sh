#!/usr/bin/env bash
# Builds the `shoal` of an older commit and prints its path: the tests run it beside today's.
#
#   scripts/older.sh            builds it where that was not done yet, and prints where it is
#
# What it costs: the crates of this workspace as they were then (2 to 3 minutes on two cores). Their
# dependencies are taken from this workspace's own build where they are the same, by hard links; nothing
# that cargo writes in place is linked, and nothing of this workspace.
#
# SHOAL_SKIP_OLDER=1 builds and prints nothing. How the commit is moved on: CONTRIBUTING.md, "An older build".
set -euo pipefail

commit=f403ba0031931334937d0c5c9449e4aeaaf27d13

cd "$(dirname "$0")/.."
target=$(scripts/target-dir)
place=$target/older/$commit
binary=$place/shoal

say() { printf 'older: %s\n' "$*" >&2; }
found() {
    if [ -x "$binary" ]; then
        printf '%s\n' "$binary"
        exit 0
    fi
}

found
if [ "${SHOAL_SKIP_OLDER:-}" = 1 ]; then
    say "left out: SHOAL_SKIP_OLDER=1"
    exit 0
fi
mkdir -p "$place"
exec 9> "$place/lock"
if ! flock --nonblock 9; then
    say "another process builds it; waiting for that"
    flock 9
fi
found

if ! git cat-file -e "$commit^{commit}" 2> /dev/null; then
    say "commit ${commit:0:7} is not in this clone, so the older build cannot be made"
    say "in a shallow clone: git fetch --unshallow; without git: SHOAL_SKIP_OLDER=1 leaves these tests out"
    exit 1
fi

# What an earlier try left, whose end nobody knows.
rm -rf "$place/src" "$place/target"
mkdir -p "$place/src" "$place/target/debug/deps"
git archive "$commit" | tar -x -C "$place/src"

ours=$target/debug
if [ -d "$ours/.fingerprint" ]; then
    for part in build .fingerprint; do
        mkdir -p "$place/target/debug/$part"
        find "$ours/$part" -mindepth 1 -maxdepth 1 ! -name 'shoal*' -exec cp -a -t "$place/target/debug/$part" {} +
    done
    find "$ours/deps" -maxdepth 1 -type f \( -name 'lib*.rlib' -o -name 'lib*.rmeta' -o -name 'lib*.so' \) ! -name 'libshoal*' \
        -exec cp -al -t "$place/target/debug/deps" {} + 2> /dev/null ||
        say "the dependencies' build cannot be shared; all of them are built again"
fi

say "building shoal of ${commit:0:7} (once; about 3 minutes on two cores)"
# The test is the smallest one: with it dependencies have the features that the whole suite gives them.
(cd "$place/src" && CARGO_TARGET_DIR=$place/target CARGO_INCREMENTAL=0 cargo build --workspace --locked --bin shoal --test wire >&2)
mv "$place/target/debug/shoal" "$binary.new"
rm -rf "$place/src" "$place/target"
mv "$binary.new" "$binary"
found
