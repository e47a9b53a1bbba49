#!/usr/bin/env bash
# Builds the programs of a Kubernetes cluster from Go modules into CACHE/bin, those that are missing.
# Each has its version in its name, and is linked to without it. Times are in CACHE/logs/build.txt.
#
#   build.sh CACHE
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=$1
export GOMODCACHE=$cache/gomod GOCACHE=$cache/gocache GOFLAGS="-mod=mod -p=$(nproc) -trimpath"
export PATH=$PATH:/usr/local/go/bin
mkdir -p "$cache"/{bin,logs,modules}

kubernetes=v1.36.3
version=k8s.io/component-base/version

fail() { echo "cluster: $*" >&2; exit 1; }

# build NAME MODULE VERSION PACKAGE [LDFLAGS] [TAGS]: PACKAGE is a path inside the module.
build() {
    local name=$1 module=$2 version=$3 package=$4 flags=${5:-} tags=${6:-}
    local program=$cache/bin/$name@$version
    ln -sfn "$name@$version" "$cache/bin/$name"
    [ ! -x "$program" ] || return 0
    command -v go >/dev/null || fail "Go is needed to build $name: https://go.dev/dl"
    echo "cluster: building $name $version"
    local place=$cache/modules/$name@$version started=$SECONDS
    mkdir -p "$place"
    # A module of its own: `go install` refuses modules that replace others, as Kubernetes does by
    # directories that only its repository has.
    (
        cd "$place"
        [ -e go.mod ] || module_of "$module" "$version" >go.mod
        nice go build -ldflags "-s -w $flags" -tags "$tags" -o "$program" "$module$package"
    ) >"$cache/logs/build-$name.log" 2>&1 \
        || fail "$name cannot be built: $(tail -1 "$cache/logs/build-$name.log")"
    echo "$name $version: $((SECONDS - started)) s, $(($(stat -c %s "$program") >> 20)) MiB" \
        | tee -a "$cache/logs/build.txt"
}

# module_of MODULE VERSION: a go.mod that requires it, and has its own parts by their published
# versions (k8s.io/api v0.36.3 for Kubernetes v1.36.3) instead of directories.
module_of() {
    local language
    language=$(go env GOVERSION)
    printf 'module cluster\n\ngo %s\n\nrequire %s %s\n' "${language#go}" "$1" "$2"
    go mod download -json "$1@$2" | sed -n 's/^\t"GoMod": "\(.*\)",$/\1/p' | xargs cat \
        | awk -v v="v0${2#v1}" '$2 == "=>" && $3 ~ /^\.\/staging\// {print "replace", $1, "=>", $1, v}'
}

export CGO_ENABLED=0
build etcd go.etcd.io/etcd/server/v3 v3.6.8 ""
flags="-X $version.gitVersion=$kubernetes -X $version.gitMajor=1 -X $version.gitMinor=36"
flags="$flags -X k8s.io/client-go/pkg/version.gitVersion=$kubernetes"
for name in kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl; do
    build $name k8s.io/kubernetes $kubernetes /cmd/$name "$flags"
done
build csi-provisioner github.com/kubernetes-csi/external-provisioner/v6 v6.4.0 /cmd/csi-provisioner \
    "-X main.version=v6.4.0"
build containerd github.com/containerd/containerd/v2 v2.3.7 /cmd/containerd "" \
    "no_btrfs no_zfs no_devmapper"
build containerd-shim-runc-v2 github.com/containerd/containerd/v2 v2.3.7 /cmd/containerd-shim-runc-v2
build ctr github.com/containerd/containerd/v2 v2.3.7 /cmd/ctr
for name in main/bridge main/loopback ipam/host-local; do
    build "${name#*/}" github.com/containernetworking/plugins v1.10.0 /plugins/$name
done
build versitygw github.com/versity/versitygw v1.8.0 /cmd/versitygw
# It enters namespaces in C.
CGO_ENABLED=1 build runc github.com/opencontainers/runc v1.5.3 "" "-X main.version=v1.5.3" seccomp
helm=$(cd "$here" && ../../.ci/go-tool helm.sh/helm/v3/cmd/helm@v3.22.0) || fail "helm cannot be built"
ln -sfn "$helm" "$cache/bin/helm"
