#!/usr/bin/env bash
# Checks licences, bans, sources and advisories as deny.toml says, as far as this machine can: what
# could not be checked is said, what was found fails.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v cargo-deny > /dev/null; then
    echo 'deny: cargo-deny is not installed, so licences and advisories were not checked' >&2
    echo '      (cargo install cargo-deny --locked)' >&2
    exit 0
fi
cargo deny --locked check bans licenses sources
# The advisories are a repository of their own, which not every machine can reach.
if cargo deny --locked fetch db 2> /dev/null; then
    cargo deny --locked --offline check advisories
else
    echo 'deny: the advisory database cannot be reached, so advisories were not checked' >&2
fi
