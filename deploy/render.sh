#!/usr/bin/env bash
# Renders the chart into plain manifests, for those who do without helm.
#
#   deploy/render.sh [DIRECTORY]      deploy/kubernetes when not given
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-deploy/kubernetes}
helm=$(.ci/go-tool helm.sh/helm/v3/cmd/helm@v3.22.0)

mkdir -p "$target"
"$helm" template lazyfs-csi deploy/helm/lazyfs-csi --namespace lazyfs --kube-version 1.30.0 \
    --set createNamespace=true \
    | grep -v -e '^ *app.kubernetes.io/managed-by: Helm$' -e '^ *helm.sh/chart: ' -e '^# Source: ' \
    | sed 's/[[:space:]]*$//' > "$target/lazyfs-csi.yaml"
