#!/usr/bin/env bash
# First process of the node: prepares its mounts, and is the service manager of containerd and kubelet.
# Both are started again when they end. Everything that the node writes is below RUN/node.
#
#   node.sh CACHE RUN
set -eu
cache=$1 run=$2
node=$run/node
export PATH=$cache/bin:$PATH

hostname node1
# Mounts of others that were copied into this mount namespace would live on here.
awk '$3 ~ /^fuse/ {print $2}' /proc/mounts | tac | while read -r each; do umount -l "$each" || true; done
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
for each in lib log cache; do
    mkdir -p "$node/$each"
    mount --bind "$node/$each" /var/$each
done
mkdir -p /var/lib/kubelet /var/log/pods
# kubelet sets these for the whole machine. Here it sets copies.
mount -t tmpfs tmpfs /mnt
for each in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    cat /proc/sys/$each >"/mnt/${each//\//.}"
    mount --bind "/mnt/${each//\//.}" /proc/sys/$each
done
# User namespaces may mount a proc only if they see one with nothing mounted on it.
mkdir /mnt/proc
mount -t proc proc /mnt/proc

serve() { # serve NAME COMMAND...: until the node ends
    local name=$1
    shift
    while :; do
        "$@" >>"$run/logs/$name.log" 2>&1 || true
        sleep 1
    done
}
serve containerd containerd --config "$run/containerd.toml" &
until ctr version >/dev/null 2>&1; do sleep 0.05; done
if [ ! -e "$node/imported" ]; then
    for each in "$cache"/images/*.tar; do
        ctr -n k8s.io images import --local --snapshotter overlayfs "$each"
    done
    touch "$node/imported"
fi
serve kubelet kubelet --config="$run/kubelet.yaml" --kubeconfig="$run/pki/kubelet.conf" \
    --hostname-override=node1 --node-ip=10.10.0.1 --root-dir=/var/lib/kubelet --v=2 &
while :; do wait -n 2>/dev/null || sleep 0.2; done
