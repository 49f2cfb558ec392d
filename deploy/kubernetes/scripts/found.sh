#!/bin/sh
# Founds the cluster, once: in coordinator 0, where no other coordinator is there and the volume is empty. An API
# that others reach needs a key, so it is founded on loopback and gets its first key (DATA/first.key).
set -eu
data=/data/shoal

others=$(getent ahostsv4 "$PEERS" | cut -d ' ' -f 1 | sort -u | grep -vxF "$POD_IP" || true)
if [ "$POD_NAME" != shoal-coordinator-0 ] || [ -e "$data/founded" ] || [ -e "$data/identity" ] || [ -n "$others" ]; then
    exit 0
fi

shoal coordinator --data "$data" --listen 127.0.0.1:8000 --cluster "$POD_IP:4000" &
coordinator=$!
tries=0
until shoal status --context "$data/admin.context" > /dev/null 2>&1; do
    tries=$((tries + 1))
    if [ "$tries" -ge 60 ] || ! kill -0 "$coordinator"; then
        echo 'found: the coordinator did not start; its words are above' >&2
        exit 1
    fi
    sleep 1
done
# Left from a try that was cut off in between: nobody has seen it.
shoal keys revoke first --context "$data/admin.context" 2> /dev/null || true
umask 077
shoal keys create first --context "$data/admin.context" > "$data/first.key"
kill -TERM "$coordinator"
wait "$coordinator"
: > "$data/founded"
