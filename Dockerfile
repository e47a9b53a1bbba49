# The image of lazyfs: the command line, the CSI driver's node plugin, controller and keeper.
#
# BASE_IMAGE is any Debian or Ubuntu with Python 3.11 or newer in its archive, named with its digest.
# `make image` makes one with debootstrap, so that no registry is needed.
ARG BASE_IMAGE

# What compiles: pyfuse3 against libfuse's headers, a module of lazyfs, the CSI messages from proto/.
FROM ${BASE_IMAGE} AS build
# For pip: a bundle of authorities, and another index than PyPI.
ARG PIP_CERT
ARG PIP_INDEX_URL
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get upgrade -y \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev libfuse3-dev pkg-config python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src

# The dependencies, which change seldom, in a place of their own. pip takes only files whose hashes are
# in constraints/. Compiled modules are not compared with their sources when they are imported.
COPY constraints constraints
RUN python3 -m pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: \
        --target /backend -r constraints/build.txt \
    && PYTHONPATH=/backend python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation \
        --require-hashes -r constraints/image.txt -w /wheels \
    && python3 -m venv --without-pip /opt/lazyfs \
    && python3 -m pip --python /opt/lazyfs/bin/python install --no-index --no-deps --no-compile \
        --no-cache-dir /wheels/*.whl \
    # Descriptions of 400 AWS services: S3, and those that give credentials, are used.
    && find /opt/lazyfs/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name 'sso*' ! -name sts ! -name signin -exec rm -r {} + \
    && find /opt/lazyfs -path '*/boto3/examples' -prune -exec rm -r {} + \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/lazyfs

# lazyfs itself, in a layer of a few hundred kilobytes.
COPY . .
RUN PYTHONPATH=/backend python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation \
        -w /ours . \
    && python3 -m pip --python /opt/lazyfs/bin/python install --no-index --no-deps --no-compile \
        --no-cache-dir --root /package /ours/lazyfs-*.whl \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /package \
    && mkdir -p /package/usr/share/doc/lazyfs \
    && cp LICENSE /package/usr/share/doc/lazyfs/copyright \
    && python3 deploy/notices.py /opt/lazyfs/lib/python3*/site-packages \
        > /package/usr/share/doc/lazyfs/THIRD-PARTY-NOTICES

# What `make release` packs: a folder that needs nothing of a distribution but its C libraries.
FROM build AS package
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends patchelf \
    && rm -rf /var/lib/apt/lists/*
RUN deploy/package/tree.sh /tree/lazyfs \
        /opt/lazyfs/lib/python3*/site-packages /package/opt/lazyfs/lib/python3*/site-packages \
    && cp /package/usr/share/doc/lazyfs/THIRD-PARTY-NOTICES /tree/lazyfs/

FROM ${BASE_IMAGE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lazyfs" \
    org.opencontainers.image.description="Models in S3 as read-only volumes, for vLLM pods" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# nginx is the cache of a fleet (lazyfs fleet-cache). tini reaps what killed workers leave behind. fusermount3 is not needed: in a container, mounting is
# for root; nothing with a set-user-id bit is left.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get upgrade -y \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates libfuse3-3 nginx python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && groupadd --system --gid 65532 lazyfs \
    && useradd --system --uid 65532 --gid 65532 --home-dir /nonexistent --no-create-home lazyfs \
    && find / -xdev -perm /6000 -type f -exec chmod ug-s {} +
COPY --from=build /opt/lazyfs /opt/lazyfs
COPY --from=build /package/opt/lazyfs /opt/lazyfs
COPY --from=build /package/usr/share/doc/lazyfs /usr/share/doc/lazyfs
ENV PATH=/opt/lazyfs/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# Root, because mounting needs it: the chart runs the controller as 65532 and the keeper without
# any capability.
# -s: it reaps processes also where it is not the first one (hostPID).
ENTRYPOINT ["/usr/bin/tini", "-s", "--"]
CMD ["lazyfs", "--help"]
