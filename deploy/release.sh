#!/usr/bin/env bash
# Builds what a release of lazyfs consists of into dist/VERSION; `make release` calls it. Needs root,
# as the image does, and Go.
#
#   dist/VERSION/
#     lazyfs-VERSION-cp311-abi3-linux_x86_64.whl, lazyfs-VERSION.tar.gz    for pip
#     lazyfs_VERSION_amd64.deb                                  for Debian 12, Ubuntu 24.04 and newer
#     lazyfs-VERSION-linux-x86_64.tar.gz                        a folder that runs anywhere
#     lazyfs-VERSION-linux-x86_64.cdx.json                      the SBOM of that folder, and of the package
#     lazyfs-VERSION-image.oci.tar, lazyfs-VERSION-image.cdx.json    the image, and its SBOM
#     lazyfs-csi-VERSION.tgz                                    the chart
#     NOTES.md, SHA256SUMS
#
# Times in the files are those of the commit, so that a second build of it gives the same wheel, sdist,
# chart and, from the same packages of Debian, the same folder. The tree must be clean.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' lazyfs/__init__.py)
dist=dist/$version
work=build/release

# same FILE: packs a .tar.gz again, with nothing in it that depends on when and by whom it was packed.
same() {
    local place=$work/same
    rm -rf "$place" && mkdir "$place"
    tar -xzmf "$1" -C "$place"
    pack "$place" "$(ls "$place")" "$1"
}
# pack DIRECTORY MEMBER FILE
pack() {
    tar --create --sort=name --mtime=@"$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
        --directory "$1" "$2" | gzip -9 --no-name >"$3"
}
fail() { echo "release: $*" >&2; exit 1; }
step() { echo "release: $*"; }

[ -n "${ALLOW_DIRTY:-}" ] || [ -z "$(git status --porcelain)" ] || fail "commit or remove what git status shows"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
for place in 'deploy/helm/lazyfs-csi/Chart.yaml:^version: ' 'deploy/helm/lazyfs-csi/Chart.yaml:^appVersion: ' \
    'CHANGELOG.md:^## '; do
    grep -Eq "${place#*:}\"?$version\b" "${place%%:*}" || fail "${place%%:*} does not say $version"
done
rm -rf "$dist" "$work"
mkdir -p "$dist" "$work"

step "wheel and sdist"
PYTHONPATH=$PWD/build/backend "$(.ci/python-tool pyproject-build)" --no-isolation --outdir "$dist" . >"$work/build.log" 2>&1 \
    || { tail -5 "$work/build.log" >&2; exit 1; }
same "$dist/lazyfs-$version.tar.gz"

step "man pages and completions"
share=$work/share
.venv/bin/python deploy/package/manual.py "$share/man"
for shell in bash:bash-completion/completions/lazyfs zsh:zsh/vendor-completions/_lazyfs \
    fish:fish/vendor_completions.d/lazyfs.fish; do
    mkdir -p "$(dirname "$share/${shell#*:}")"
    .venv/bin/lazyfs completion "${shell%%:*}" >"$share/${shell#*:}"
done

step "the folder with its own Python"
STAGE=package IMAGE=lazyfs-package:$version deploy/image.sh >"$work/image.log" || { tail -5 "$work/image.log" >&2; exit 1; }
STAGE_STORAGE=(--root build/image/storage --runroot build/image/run)
container=$(buildah "${STAGE_STORAGE[@]}" from --pull-never "lazyfs-package:$version")
trap 'buildah "${STAGE_STORAGE[@]}" rm "$container" >/dev/null' EXIT
tree=$(buildah "${STAGE_STORAGE[@]}" mount "$container")/tree
cp -a "$tree/lazyfs" "$work/lazyfs"
deploy/sbom.sh "$tree" "$version" "$PWD/$dist/lazyfs-$version-linux-x86_64.cdx.json"
find "$work/lazyfs" "$share" -exec touch --no-dereference --date=@"$SOURCE_DATE_EPOCH" {} +

step "Debian package"
gzip -9 --no-name "$share"/man/man?/*
VERSION=$version ARCH=amd64 \
    "$(.ci/go-tool github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.2)" package --config deploy/package/nfpm.yaml \
    --packager deb --target "$dist" >"$work/nfpm.log" 2>&1 || { tail -5 "$work/nfpm.log" >&2; exit 1; }

step "archive"
folder=lazyfs-$version-linux-x86_64
cp -a "$work/lazyfs" "$work/$folder"
cp -a "$share" "$work/$folder/share"
cp -p LICENSE deploy/package/example.toml "$work/$folder"
pack "$work" "$folder" "$dist/$folder.tar.gz"

step "chart"
"$(.ci/go-tool helm.sh/helm/v3/cmd/helm@v3.22.0)" package deploy/helm/lazyfs-csi --destination "$dist" >/dev/null
same "$dist/lazyfs-csi-$version.tgz"

step "image and its SBOM"
OCI_ARCHIVE=$dist/lazyfs-$version-image.oci.tar SBOM=$dist/lazyfs-$version-image.cdx.json deploy/image.sh \
    >"$work/image.log" || { tail -5 "$work/image.log" >&2; exit 1; }

awk -v head="## $version" 'index($0, "## ") == 1 {on = index($0, head) == 1} on' CHANGELOG.md >"$dist/NOTES.md"
(cd "$dist" && sha256sum -- * >../SHA256SUMS && mv ../SHA256SUMS .)
(cd "$dist" && du -h -- *)
