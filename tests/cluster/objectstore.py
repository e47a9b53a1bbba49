"""The S3 of the cluster: versitygw, which checks keys and rights, with its IAM and STS.

Users, keys, roles and their policies are made by the API of AWS IAM. STS checks the tokens of
service accounts with the keys of their issuer, which is the API server.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from namespaces import parent

# As pods know them: the first is the name in deploy/examples/minio-secret.yaml.
ENDPOINT = "https://minio.storage.svc.cluster.local"
STS_ENDPOINT = "https://sts.storage.svc.cluster.local"
S3_ADDRESS = "10.96.0.20:443"
IAM_ADDRESS = "10.96.0.21:443"
REGION = "us-east-1"
ACCOUNT = "000000000000"
# Of the service accounts' tokens. STS wants one that is not a private address, as AWS does.
ISSUER = "https://203.0.113.1"
ROOT = ("root", "root-secret-of-the-cluster")

Key = dict[str, str]
Start = Callable[[str, Sequence[str]], int]


class ObjectStore:
    """S3, IAM and STS.

    Args:
        start: starts a program by a name and its command; gives its process id.
        programs: where versitygw is.
        run: the cluster's directory.
    """

    def __init__(self, start: Start, programs: Path, run: Path) -> None:
        self._start, self._program, self._run = start, programs / "versitygw", run
        self.client = self._client("s3", S3_ADDRESS)
        self.iam = self._client("iam", IAM_ADDRESS)

    def _client(self, service: str, address: str) -> Any:
        return boto3.client(
            service,  # type: ignore[call-overload]
            endpoint_url=f"https://{address}",
            aws_access_key_id=ROOT[0],
            aws_secret_access_key=ROOT[1],
            region_name=REGION,
            verify=str(self._run / "pki" / "ca.crt"),
            config=Config(retries={"max_attempts": 12}, s3={"addressing_style": "path"}),
        )

    def start(self) -> None:
        """Start both servers; users and objects of before are there again.

        They cannot be waited for here: only the cluster's network leads to them.
        """
        for each in ("s3", "iam"):
            (self._run / each).mkdir(exist_ok=True)
        socket = self._run / "iam.sock"
        socket.unlink(missing_ok=True)
        self._serve("iam", IAM_ADDRESS, "--region", REGION, "iam", "--dir", str(self._run / "iam"),
                    "--private-ports", str(socket))  # fmt: skip
        self._serve_s3()

    def start_again(self) -> None:
        """Start S3 after a SIGKILL, and wait for it."""
        self._serve_s3()
        self.client.list_buckets()

    def _serve_s3(self) -> None:
        self._serve("s3", S3_ADDRESS, "--region", REGION, "--iam-cache-disable",
                    "--iam-standalone-endpoint", str(self._run / "iam.sock"),
                    "posix", str(self._run / "s3"))  # fmt: skip

    def _serve(self, name: str, address: str, *arguments: str) -> None:
        pki = self._run / "pki"
        # A variable that Go programs take their authorities from.
        command = ["env", f"SSL_CERT_FILE={pki}/ca.crt", str(self._program), "--quiet"]
        command += ["--access", ROOT[0], "--secret", ROOT[1], "--port", address]
        command += ["--cert", f"{pki}/{name}.crt", "--key", f"{pki}/{name}.key"]
        pid = self._start(name, [*command, *arguments])
        (self._run / f"{name}.pid").write_text(str(pid))

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP: S3 is silent, until SIGCONT. SIGKILL: it refuses, until `start_again`."""
        pid = int((self._run / "s3.pid").read_text())
        if number == signal.SIGCONT:
            # nsenter stops itself with its child, and would never reap it.
            os.kill(parent(pid), number)
        os.kill(pid, number)

    # Users and roles.

    def make_user(
        self, name: str, buckets: Sequence[str] = ("*",), *, may_read: bool = True
    ) -> Key:
        """A user that may list and, if so, read buckets; its key, as a Secret has it."""
        policy = reading(buckets)
        if not may_read:
            policy["Statement"][0]["Action"] = ["s3:ListBucket"]
        self.iam.create_user(UserName=name)
        self.iam.put_user_policy(
            UserName=name, PolicyName="read", PolicyDocument=json.dumps(policy)
        )
        return self.new_key(name)

    def new_key(self, user: str) -> Key:
        """Another key for a user; all that it had are refused from now on."""
        for old in self.iam.list_access_keys(UserName=user)["AccessKeyMetadata"]:
            self.iam.delete_access_key(UserName=user, AccessKeyId=old["AccessKeyId"])
        made = self.iam.create_access_key(UserName=user)["AccessKey"]
        return {"accessKeyId": made["AccessKeyId"], "secretAccessKey": made["SecretAccessKey"]}

    def make_role(self, name: str, subject: str, buckets: Sequence[str]) -> str:
        """A role for one service account; its ARN.

        Args:
            subject: `system:serviceaccount:NAMESPACE:NAME`.
        """
        issuer = ISSUER.removeprefix("https://")
        provider = f"arn:aws:iam::{ACCOUNT}:oidc-provider/{issuer}"
        known = self.iam.list_open_id_connect_providers()["OpenIDConnectProviderList"]
        if provider not in [each["Arn"] for each in known]:
            self.iam.create_open_id_connect_provider(
                Url=ISSUER, ClientIDList=["sts.amazonaws.com"], ThumbprintList=["0" * 40]
            )
        trust = {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"Federated": provider},
                    "Action": "sts:AssumeRoleWithWebIdentity",
                    "Condition": {"StringEquals": {f"{issuer}:sub": subject}},
                }
            ],
        }
        role = self.iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))
        self.iam.put_role_policy(
            RoleName=name, PolicyName="read", PolicyDocument=json.dumps(reading(buckets))
        )
        return str(role["Role"]["Arn"])

    # Models.

    def put_model(self, bucket: str, prefix: str, shards: int = 1, shard_mib: int = 2) -> None:
        """A model of safetensors files, with the digests that `vllm.py` compares.

        Args:
            prefix: with a slash at its end.
        """
        names = [each["Name"] for each in self.client.list_buckets()["Buckets"]]
        if bucket not in names:
            self.client.create_bucket(Bucket=bucket)
        contents = {
            f"model-{number:05d}-of-{shards:05d}.safetensors": shard(
                f"{bucket}/{prefix}{number}", shard_mib
            )
            for number in range(1, shards + 1)
        }
        digests = {name: hashlib.sha256(body).hexdigest() for name, body in contents.items()}
        contents["config.json"] = b'{"model_type": "llama"}'
        contents["sha256.json"] = json.dumps(digests).encode()
        for name, body in contents.items():
            self.client.put_object(Bucket=bucket, Key=f"{prefix}{name}", Body=body)


def reading(buckets: Sequence[str]) -> dict[str, Any]:
    """A policy that allows what a mount needs (docs/OPERATIONS.md)."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:ListBucket", "s3:GetObject"],
                "Resource": [
                    f"arn:aws:s3:::{name}{what}" for name in buckets for what in ("", "/*")
                ],
            }
        ],
    }


def shard(seed: str, mebibytes: int) -> bytes:
    """A safetensors file of tensors of a MiB, whose bytes follow from `seed`."""
    piece = 1 << 20
    header = {
        f"layers.{number}.weight": {
            "dtype": "F16",
            "shape": [piece // 2],
            "data_offsets": [number * piece, (number + 1) * piece],
        }
        for number in range(mebibytes)
    }
    text = json.dumps(header).encode()
    body = random.Random(seed).randbytes(mebibytes * piece)
    return struct.pack("<Q", len(text)) + text + body
