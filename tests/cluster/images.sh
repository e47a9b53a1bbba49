#!/usr/bin/env bash
# Makes the images of the cluster as archives in CACHE/images: the product's (deploy/image.sh), one
# that stands for vLLM, the provisioner, and pause. No registry is needed.
#
#   images.sh CACHE
set -euo pipefail
cd "$(dirname "$0")"
cache=$1
images=$cache/images
storage=$cache/storage
provisioner=$(sed -n '/repository: sig-storage\/csi-provisioner/{n;s/.*tag: //p}' \
    ../../deploy/helm/lazyfs-csi/values.yaml)
version=$(sed -n 's/^appVersion: "\?\([^"]*\)"\?$/\1/p' ../../deploy/helm/lazyfs-csi/Chart.yaml)
lazyfs=registry.example/lazyfs/lazyfs:$version
mkdir -p "$images"
store() { buildah --root "$storage/storage" --runroot "$storage/run" "$@"; }

# image ARCHIVE NAME BASE FILES... -- CONFIG...: FILES are pairs SOURCE TARGET.
image() {
    local archive=$images/$1.tar name=$2 container
    container=$(store from --pull-never "$3")
    shift 3
    while [ "$1" != -- ]; do
        store add --quiet "$container" "$1" "$2" >/dev/null
        shift 2
    done
    store config "${@:2}" "$container"
    store commit --quiet --rm "$container" "$name" >/dev/null
    rm -f "$archive"
    store push --quiet "$name" "docker-archive:$archive:$name"
}

rm -f "$images/lazyfs.tar"
IMAGE=$lazyfs STORAGE=$storage ARCHIVE=$images/lazyfs.tar ../../deploy/image.sh >/dev/null
image vllm docker.io/vllm/vllm-openai:v0.15.0 "$lazyfs" \
    vllm.py /usr/local/bin/vllm vllm.py /usr/local/lib/vllm/vllm.py \
    -- --env PYTHONPATH=/usr/local/lib/vllm
if [ ! -e "$images/provisioner-$provisioner.tar" ]; then
    image "provisioner-$provisioner" "registry.k8s.io/sig-storage/csi-provisioner:$provisioner" \
        scratch "$cache/bin/csi-provisioner@$provisioner" /csi-provisioner \
        -- --entrypoint '["/csi-provisioner"]'
fi
if [ ! -e "$images/pause.tar" ]; then
    echo 'int pause(void); int main(void) { for (;;) pause(); }' \
        | gcc -O2 -static -x c -o "$cache/bin/pause" -
    image pause registry.k8s.io/pause:3.10 scratch "$cache/bin/pause" /pause \
        -- --entrypoint '["/pause"]'
fi
