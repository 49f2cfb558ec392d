#!/bin/sh
# worker-admin.sh drain | undrain: moves this worker's layers to others before its pod ends, and lets it hold some again
# afterwards. It needs the Secret shoal-admin with a context file that is younger than a day; without one SIGTERM
# alone drains: streams then pause and go on elsewhere by replay.
set -eu
export SHOAL_CONTEXT=/etc/shoal/admin/admin.context
[ -s "$SHOAL_CONTEXT" ] || exit 0

# Which worker this is: the one that is connected from this pod's address.
node=
tries=0
while [ -z "$node" ] && [ "$tries" -lt 10 ]; do
    [ "$tries" -eq 0 ] || sleep 1
    tries=$((tries + 1))
    node=$(shoal status --json | grep -o "\"id\":\"w[0-9]*\",\"connected\":true[^{}]*\"address\":\"$POD_IP:" | cut -d '"' -f 4 || true)
done
[ -n "$node" ] || exit 0

case "$1" in
drain) shoal drain "$node" --wait --timeout 5m || true ;;
undrain) shoal undrain "$node" || true ;;
*) echo "worker-admin.sh: $1 is neither drain nor undrain" >&2; exit 2 ;;
esac
