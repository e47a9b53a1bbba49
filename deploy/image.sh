#!/usr/bin/env bash
# Builds the image of lazyfs with buildah, on a base that debootstrap makes, so that neither a
# registry nor a daemon is needed; `make image` calls it and then runs what it built
# (tests/deploy/test_image.py). Needs root, and the network for Debian's archive and PyPI.
#
#   IMAGE=lazyfs:0.1.0         its name
#   BASE_IMAGE=debian:trixie   a base from a registry instead of one made here
#   ARCHIVE=lazyfs.tar         write it into a file too, for docker load, ctr import, skopeo
#   SUITE, MIRROR              what debootstrap makes the base of, and from where
#   STORAGE=build/image        where the base and the layers are kept
#   PIP_INDEX_URL              another index than PyPI
#
# Ends with 77 and a sentence where the tools are missing and cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' lazyfs/__init__.py)
image=${IMAGE:-lazyfs:$version}
suite=${SUITE:-bookworm}
mirror=${MIRROR:-http://deb.debian.org/debian}
here=$(realpath -m "${STORAGE:-build/image}")
authorities=/etc/ssl/certs/ca-certificates.crt

skip() { echo "image: $*" >&2; exit 77; }

[ "$(id -u)" = 0 ] || skip "not built: debootstrap and buildah need root."
missing=()
command -v buildah >/dev/null || missing+=(buildah)
[ -n "${BASE_IMAGE:-}" ] || command -v debootstrap >/dev/null || missing+=(debootstrap)
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || skip "not built: please install ${missing[*]}."
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
        >/dev/null 2>&1 || skip "not built: apt-get could not install ${missing[*]}."
fi

mkdir -p "$here"
# A storage of its own: nothing is mixed with images that are on this machine already.
storage=(--root "$here/storage" --runroot "$here/run")
store() { buildah "${storage[@]}" "$@"; }

base=${BASE_IMAGE:-localhost/lazyfs-base:$suite}
if [ -z "${BASE_IMAGE:-}" ] && ! store inspect --type image "$base" >/dev/null 2>&1; then
    echo "image: making the base $base from $mirror"
    root=$(mktemp -d "$here/base.XXXXXX")
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase "$suite" "$root" "$mirror" > "$here/debootstrap.log" \
        || { tail -3 "$here/debootstrap.log" >&2; exit 1; }
    # What nobody reads in a container, as in Debian's own slim images.
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
    find "$root"/usr/share/{doc,info,locale,man} -mindepth 1 -type f ! -name copyright -delete
    printf 'path-exclude=/usr/share/%s\n' 'doc/*' 'info/*' 'locale/*' 'man/*' \
        > "$root"/etc/dpkg/dpkg.cfg.d/slim
    echo 'path-include=/usr/share/doc/*/copyright' >> "$root"/etc/dpkg/dpkg.cfg.d/slim
    container=$(store from scratch)
    store add --quiet "$container" "$root" / >/dev/null
    store config --cmd '["bash"]' "$container"
    store commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$root"
fi

arguments=(
    --build-arg BASE_IMAGE="$base"
    --build-arg VERSION="$version"
    --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
)
# An authority that this machine trusts besides the usual ones, as behind a company's proxy.
[ ! -r $authorities ] || arguments+=(
    --volume "$authorities:/run/authorities.crt:ro" --build-arg PIP_CERT=/run/authorities.crt
)
[ -z "${PIP_INDEX_URL:-}" ] || arguments+=(--build-arg PIP_INDEX_URL="$PIP_INDEX_URL")
pull=--pull-never
[ -z "${BASE_IMAGE:-}" ] || pull=--pull
echo "image: building $image on $base"
store bud --isolation chroot --layers $pull --tag "$image" "${arguments[@]}" . \
    > "$here/build.log" 2>&1 || { tail -20 "$here/build.log" >&2; exit 1; }
[ -z "${ARCHIVE:-}" ] || store push --quiet "$image" "docker-archive:$ARCHIVE:$image"
store images "$image"
