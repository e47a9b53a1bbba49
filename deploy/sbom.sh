#!/usr/bin/env bash
# Writes the SBOM of a directory, in the format of CycloneDX: its packages of Debian and of Python.
# Needs Go; without it .ci/go-tool says that there is no SBOM, and this ends with its status.
#
#   sbom.sh DIRECTORY VERSION FILE
set -euo pipefail
syft=$("$(dirname "$0")/../.ci/go-tool" github.com/anchore/syft/cmd/syft@v1.57.1)
# Packages: their files would be a list thirty times as long.
SYFT_FILE_METADATA_SELECTION=none "$syft" scan --quiet "dir:$1" --source-name lazyfs \
    --source-version "$2" --output "cyclonedx-json=$3"
