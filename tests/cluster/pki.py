"""The cluster's certificates, made by openssl, and the kubeconfigs that use them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

SERVER = "https://10.10.0.1:443"
# Client certificates of Kubernetes' own components: name, and subject as RBAC and the Node
# authoriser know it (https://kubernetes.io/docs/setup/best-practices/certificates/).
CLIENTS = {
    "admin": "/O=system:masters/CN=admin",
    "apiserver-kubelet": "/O=system:masters/CN=apiserver-kubelet",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "kubelet": "/O=system:nodes/CN=system:node:node1",
}
SERVERS = {
    "apiserver": "DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.10.0.1,IP:10.96.0.1,IP:203.0.113.1",
    "kubelet": "DNS:node1,IP:10.10.0.1",
    "s3": "DNS:minio.storage.svc.cluster.local,IP:10.96.0.20",
    "iam": "DNS:sts.storage.svc.cluster.local,IP:10.96.0.21",
}


def make(directory: Path) -> None:
    """An authority, a certificate of it for each component, kubeconfigs, and the key of tokens."""
    directory.mkdir(parents=True)
    directory.chmod(0o700)
    ca = directory / "ca"
    _certificate(directory, "ca", "/CN=cluster")
    signed = ["-CA", f"{ca}.crt", "-CAkey", f"{ca}.key",
              "-addext", "basicConstraints=critical,CA:FALSE",
              "-addext", "extendedKeyUsage=clientAuth,serverAuth"]  # fmt: skip
    for name in {**CLIENTS, **SERVERS}:
        names = SERVERS.get(name)
        _certificate(directory, name, CLIENTS.get(name, f"/CN={name}"), *signed,
                     *(["-addext", f"subjectAltName={names}"] if names else []))  # fmt: skip
    for name in CLIENTS:
        files = {"client-certificate": f"{directory}/{name}.crt",
                 "client-key": f"{directory}/{name}.key"}  # fmt: skip
        (directory / f"{name}.conf").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [
                        {
                            "name": "cluster",
                            "cluster": {"server": SERVER, "certificate-authority": f"{ca}.crt"},
                        }
                    ],
                    "users": [{"name": name, "user": files}],
                    "contexts": [{"name": name, "context": {"cluster": "cluster", "user": name}}],
                    "current-context": name,
                }
            )
        )
    key = directory / "tokens.key"
    _openssl("genpkey", "-algorithm", "RSA", "-out", str(key))
    _openssl("pkey", "-in", str(key), "-pubout", "-out", str(directory / "tokens.pub"))


def _certificate(directory: Path, name: str, subject: str, *arguments: str) -> None:
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-days", "30", "-subj", subject, "-keyout", str(directory / f"{name}.key"),
        "-out", str(directory / f"{name}.crt"), *arguments,
    )  # fmt: skip


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
