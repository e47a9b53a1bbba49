#!/usr/bin/env bash
# Renders the chart into plain manifests, for those who do without helm.
#
#   deploy/render.sh [DIRECTORY]      deploy/kubernetes when not given
#   KUBE_VERSION=1.30.0               for an older Kubernetes than 1.36, which refuses newer fields
#   REGISTRY=registry.example         yours, where the image is
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-deploy/kubernetes}
version=${KUBE_VERSION:-1.36.0}
registry=${REGISTRY:-registry.example}
helm=$(.ci/go-tool helm.sh/helm/v3/cmd/helm@v3.22.0)

mkdir -p "$target"
{
    echo "# Kubernetes ${version%.*} or newer. For an older one, and with your registry in place of"
    echo "# registry.example: KUBE_VERSION=1.30.0 REGISTRY=YOURS deploy/render.sh DIRECTORY"
    "$helm" template lazyfs-csi deploy/helm/lazyfs-csi --namespace lazyfs --kube-version "$version" \
        --set createNamespace=true --set images.lazyfs.registry="$registry" \
        | grep -v -e '^ *app.kubernetes.io/managed-by: Helm$' -e '^ *helm.sh/chart: ' -e '^# Source: ' \
        | sed 's/[[:space:]]*$//'
} > "$target/lazyfs-csi.yaml"
