#!/bin/sh
# Starts a coordinator. Pods get a new address at each start, and --join takes addresses: so the others are looked
# up here. One that has an identity uses them only to find the others again.
set -eu
others=$(getent ahostsv4 "$PEERS" | cut -d ' ' -f 1 | sort -u | grep -vxF "$POD_IP" | sed 's/$/:4000/' | paste -s -d , -)
# shellcheck disable=SC2086 # SHOAL_OPTIONS is several words
exec shoal coordinator --data /data/shoal --listen 0.0.0.0:8000 --cluster "$POD_IP:4000" \
    ${others:+--join "$others"} ${SHOAL_OPTIONS:-}
