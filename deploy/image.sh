#!/usr/bin/env bash
# Builds the image of lazyfs with buildah, on a base that debootstrap makes, so that neither a
# registry nor a daemon is needed; `make image` calls it and then runs what it built
# (tests/deploy/test_image.py). Needs root, and the network for Debian's archive and PyPI.
#
#   IMAGE=lazyfs:0.1.0         its name
#   BASE_IMAGE=NAME@sha256:... a base from a registry instead of one made here
#   ARCHIVE=lazyfs.tar         write it into a file too, for docker load, ctr import, skopeo
#   OCI_ARCHIVE=lazyfs.oci.tar the same in the format of OCI
#   SBOM=lazyfs.cdx.json       write what is in it into a file, in the format of CycloneDX (needs Go)
#   STAGE=package              build this stage of the Dockerfile instead of the last one
#   SUITE, MIRROR              what debootstrap makes the base of (bookworm), and from where: as this
#                              machine's apt when not given
#   STORAGE=build/image        where the base and the layers are kept
#   PIP_INDEX_URL              another index than PyPI
#
# Ends with 77 and a sentence where the tools are missing and cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' lazyfs/__init__.py)
image=${IMAGE:-lazyfs:$version}
suite=${SUITE:-bookworm}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
here=$(realpath -m "${STORAGE:-build/image}")
authorities=/etc/ssl/certs/ca-certificates.crt

skip() { echo "image: $*" >&2; exit 77; }

[ "$(id -u)" = 0 ] || skip "not built: debootstrap and buildah need root."
missing=()
command -v buildah >/dev/null || missing+=(buildah)
if [ -z "${BASE_IMAGE:-}" ]; then
    command -v debootstrap >/dev/null || missing+=(debootstrap)
    [ -e $keyring ] || missing+=(debian-archive-keyring)
elif [[ "$BASE_IMAGE" != *@sha256:* ]]; then
    echo "image: BASE_IMAGE=$BASE_IMAGE may be another image tomorrow: add its digest" \
        "(NAME@sha256:...)" >&2
    exit 2
fi
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
# from_apt SUITE: the archive where this machine's apt finds a suite; nothing if it knows none.
from_apt() {
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Identifier: Packages' \
        | awk -v suite="$1" '$1 == suite {print $2; exit}'
}
if [ -z "${BASE_IMAGE:-}" ] && ! store inspect --type image "$base" >/dev/null 2>&1; then
    mirror=${MIRROR:-$(from_apt "$suite")}
    if [ -z "$mirror" ]; then
        echo "image: this machine's apt has no $suite: set MIRROR to the address of an archive" >&2
        exit 2
    fi
    echo "image: making the base $base from $mirror"
    root=$(mktemp -d "$here/base.XXXXXX")
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --force-check-gpg --keyring=$keyring "$suite" "$root" "$mirror" \
        > "$here/debootstrap.log" || { tail -3 "$here/debootstrap.log" >&2; exit 1; }
    # The build upgrades what is in it: with security fixes, where this machine gets them too.
    security=$(from_apt "$suite-security")
    [ -z "$security" ] || echo "deb [signed-by=$keyring] $security $suite-security main" \
        > "$root/etc/apt/sources.list.d/security.list"
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
store bud --isolation chroot --layers $pull ${STAGE:+--target "$STAGE"} --tag "$image" \
    "${arguments[@]}" . > "$here/build.log" 2>&1 || { tail -20 "$here/build.log" >&2; exit 1; }
[ -z "${ARCHIVE:-}" ] || store push --quiet "$image" "docker-archive:$ARCHIVE:$image"
[ -z "${OCI_ARCHIVE:-}" ] || store push --quiet "$image" "oci-archive:$OCI_ARCHIVE:$image"
if [ -n "${SBOM:-}" ]; then
    container=$(store from --pull-never "$image")
    deploy/sbom.sh "$(store mount "$container")" "$version" "$SBOM" || [ $? = 77 ]
    store rm "$container" >/dev/null
fi
store images "$image"
