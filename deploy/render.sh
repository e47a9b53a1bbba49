#!/usr/bin/env bash
# Renders the chart into plain manifests, for those who do without helm.
#
#   deploy/render.sh [DIRECTORY]      deploy/kubernetes when not given
#   KUBE_VERSION=1.30.0               for an older Kubernetes than 1.36, which refuses newer fields
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-deploy/kubernetes}
version=${KUBE_VERSION:-1.36.0}
helm=$(.ci/go-tool helm.sh/helm/v3/cmd/helm@v3.22.0)

mkdir -p "$target"
{
    echo "# Kubernetes ${version%.*} or newer. For an older one: KUBE_VERSION=1.30.0 deploy/render.sh DIRECTORY"
    "$helm" template lazyfs-csi deploy/helm/lazyfs-csi --namespace lazyfs --kube-version "$version" \
        --set createNamespace=true \
        | grep -v -e '^ *app.kubernetes.io/managed-by: Helm$' -e '^ *helm.sh/chart: ' -e '^# Source: ' \
        | sed 's/[[:space:]]*$//'
} > "$target/lazyfs-csi.yaml"
