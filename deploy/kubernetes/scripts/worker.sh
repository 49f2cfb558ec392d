#!/bin/sh
# Starts a worker. Any coordinator that answers names the others.
set -eu
coordinators=$(getent ahostsv4 "$PEERS" | cut -d ' ' -f 1 | sort -u | sed 's/$/:4000/' | paste -s -d , -)
if [ -z "$coordinators" ]; then
    echo "worker: no coordinator has the name $PEERS yet; trying again" >&2
    sleep 2
    exit 4
fi
# shellcheck disable=SC2086 # SHOAL_OPTIONS is several words
exec shoal worker --data /data/shoal --join "$coordinators" ${SHOAL_OPTIONS:-}
