"""Parses what Kubernetes passes for a volume: attributes, mount flags, secrets.

Pure: no I/O, no state. The attributes of a volume (`volume_context`, a PersistentVolume's
`volumeAttributes`, most parameters of a StorageClass) are

    source                  s3://BUCKET or s3://BUCKET/PREFIX, or in two parts:
    bucket or bucketName    and, if wanted, prefix
    waitFor                 headers or model: what must be here before staging returns; not set:
                            nothing
    roleArn                 the role that a pod's service account takes on (web identity)
    snapshotMaxAge          how old the listing of S3 may be that a new pod sees
    each mount option       by its camelCase name, `blockSize`, as in docs/OPTIONS.md; patterns
                            are separated by commas

A mount flag (`mountOptions`) is `key=value` of a mount option; `ro` may stand there too.
Everything that is wrong raises InvalidArgumentError, naming key, value and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from csi.endpoints import AllowedEndpoints
from csi.errors import InvalidArgumentError
from csi.request_fields import check_size, has_control_characters
from lazyfs.errors import OptionError
from lazyfs.options.layers import merged
from lazyfs.options.mount_options import OPTIONS, MountOptions, Option
from lazyfs.options.option_types import Duration, Size, format_size
from lazyfs.store.credentials import StaticCredentials
from lazyfs.store.url import SourceUrl

# Keys that kubelet and external-provisioner add to what a user wrote.
ADDED_KEYS = ("csi.storage.k8s.io/", "storage.kubernetes.io/")
WAIT_FOR = ("headers", "model")
# Volumes may not set options that concern the whole node or that read or write its files, unless
# --allow-attributes names them.
OF_THE_NODE = frozenset(
    (
        "profile",
        "ca-bundle",
        "refuse-local",
        "allow-other",
        "cache-dir",
        "cache-size",
        "cache-reserve",
        "access-check",
        "fleet-cache",
        "log-format",
        "log-file",
        "metrics-address",
    )
)
_BY_CAMEL_CASE = {option.camel_case: option for option in OPTIONS}
_SOURCE_KEYS = ("source", "bucket", "bucketName", "prefix")
_OTHER_KEYS = ("waitFor", "roleArn", "snapshotMaxAge")
MAX_MEMORY_LIMIT = Size(64 << 20, 1 << 40)
SNAPSHOT_MAX_AGE = Duration(0, 365 * 86400)
_ROLE_ARN = re.compile(r"arn:[\w-]+:iam::\d*:role/[\w+=,.@/-]{1,512}", re.ASCII)
_SECRET_KEYS = {
    "access_key_id": ("accessKeyId", "AWS_ACCESS_KEY_ID", "aws_access_key_id"),
    "secret_access_key": ("secretAccessKey", "AWS_SECRET_ACCESS_KEY", "aws_secret_access_key"),
    "session_token": ("sessionToken", "AWS_SESSION_TOKEN", "aws_session_token"),
}

Texts = dict[str, str | list[str]]


@dataclass(frozen=True, slots=True)
class Volume:
    """One volume, parsed from its attributes.

    Attributes:
        source: `s3://bucket/prefix`.
        options: texts by option name (`lazyfs/options/`), the driver's own defaults among them.
        wait_for: what staging waits for: `headers`, `model`, or None for nothing.
        role_arn: the role to assume with the pod's service-account token.
        snapshot_max_age_s: how old the listing of S3 may be that a new pod sees.
    """

    source: str
    options: Mapping[str, str | list[str]]
    wait_for: str | None = None
    role_arn: str | None = None
    snapshot_max_age_s: float = 0.0

    @property
    def mount_options(self) -> MountOptions:
        """The options, read."""
        return MountOptions.parse(("{attribute}", self.options))


@dataclass(frozen=True, slots=True)
class Rules:
    """What the administrator allows volumes to set, and the defaults.

    Attributes:
        allowed: names of the options that a volume may set.
        max_memory_limit: bytes; the most that a volume may ask for as `memoryLimit`.
        defaults: valid texts by option name, for what a volume does not set.
        endpoints: which ones inline volumes may name, besides the default.
        snapshot_max_age_s: of volumes that do not set it.
    """

    allowed: frozenset[str] = frozenset(option.name for option in OPTIONS) - OF_THE_NODE
    max_memory_limit: int | None = None
    defaults: Mapping[str, str | list[str]] = field(default_factory=dict)
    endpoints: AllowedEndpoints = field(default_factory=AllowedEndpoints)
    snapshot_max_age_s: float = 0.0

    def volume(
        self,
        attributes: Mapping[str, str],
        mount_flags: Iterable[str] = (),
        *,
        inline: bool = False,
    ) -> Volume:
        """Read a volume's attributes (`volume_context`) and mount flags.

        Args:
            inline: the author of the pod wrote them; otherwise an administrator did.

        Raises:
            InvalidArgumentError: one is unknown, not allowed here, or has a wrong value.
        """
        own = own_attributes(attributes)
        check_size("the volume's attributes", own)
        texts: Texts = {}
        for key, value in own.items():
            if key not in _SOURCE_KEYS and key not in _OTHER_KEYS:
                self._set(texts, "volume attribute", key, value)
        flags: Texts = {}
        for flag in mount_flags:
            key, _, value = flag.partition("=")
            if flag != "ro":
                self._set(flags, "mount option", key, value)
        for name in texts.keys() & flags.keys():
            if texts[name] != flags[name]:
                raise InvalidArgumentError(
                    f"{name}: given as volume attribute and as mount option, with other values; "
                    "leave one out"
                )
        given = {**texts, **flags}
        if inline:
            given |= self._where(given)
        volume = Volume(
            source=str(source_of(own)),
            options=self._checked(given),
            wait_for=_wait_for(own.get("waitFor")),
            role_arn=_role_arn(own.get("roleArn")),
            snapshot_max_age_s=self._max_age_s(own.get("snapshotMaxAge")),
        )
        options = volume.mount_options
        if volume.wait_for and not options.brings(volume.wait_for):
            raise InvalidArgumentError(
                f"waitFor: {volume.wait_for!r} is not allowed with prefetch {options.prefetch} and "
                f"prefetchOn {options.prefetch_on}, which do not bring it before a file is opened"
            )
        return volume

    def _set(self, texts: Texts, what: str, key: str, value: str) -> None:
        """Store the text of one option."""
        option = _BY_CAMEL_CASE.get(key)
        if option is None:
            raise InvalidArgumentError(_unknown(what, key))
        # A volume may disable the fleet's cache, but not name another one.
        if option.name not in self.allowed and (option.name, value) != ("fleet-cache", "off"):
            raise InvalidArgumentError(
                f"{what} {key}: {option.kind.shown(value)} is not allowed: volumes may not set "
                f"{key} here; "
                "the driver's --allow-attributes says what they may"
            )
        if option.kind.repeatable:
            before = texts.get(option.name, [])
            assert isinstance(before, list)
            texts[option.name] = [*before, *value.split(",")]
        elif option.name in texts:
            raise InvalidArgumentError(f"{what} {key}: given several times; it takes one value")
        else:
            texts[option.name] = value

    def _max_age_s(self, text: str | None) -> float:
        if not text:
            return self.snapshot_max_age_s
        try:
            return SNAPSHOT_MAX_AGE.parse(text)
        except ValueError:
            raise InvalidArgumentError(
                f"snapshotMaxAge: {text!r} is not allowed: {SNAPSHOT_MAX_AGE.allowed}"
            ) from None

    def _where(self, texts: Texts) -> Texts:
        """The options that follow from the endpoint that an inline volume names.

        Raises:
            InvalidArgumentError: the volume may not use that endpoint.
        """
        default = self.defaults.get("endpoint-url")
        named = texts.get("endpoint-url", default)
        if named is None:
            return {}
        found = self.endpoints.find(str(named), None if default is None else str(default))
        if found is None:
            raise InvalidArgumentError(
                f"endpointUrl: {named!r} is not allowed: inline volumes may only use "
                f"{self.endpoints.shown(None if default is None else str(default))} "
                "(volumes.allowedEndpoints of the chart, --allowed-endpoint of the driver)"
            )
        # The administrator has not vouched for the address of BUCKET.HOST either.
        is_virtual = texts.get("addressing-style") == "virtual"
        guarded: Texts = {"refuse-local": "true"} if is_virtual or not found.is_named else {}
        return {"endpoint-url": found.url, **guarded} if "endpoint-url" in texts else guarded

    def _checked(self, texts: Texts) -> Texts:
        try:
            options = MountOptions.parse(("{attribute}", texts), ("--{name}", self.defaults))
        except OptionError as error:
            raise InvalidArgumentError(str(error)) from None
        most = self.max_memory_limit
        set_by = next((name for name in ("memory-limit", "preset") if name in texts), None)
        if most is not None and set_by is not None and options.memory_limit > most:
            what = f"memoryLimit: {texts[set_by]!r}"
            if set_by == "preset":
                what = f"preset: {texts[set_by]!r}, which sets memoryLimit to "
                what += format_size(options.memory_limit)
            raise InvalidArgumentError(
                f"{what} is not allowed: at most {format_size(most)} (--max-memory-limit of the "
                "driver)"
            )
        if most is not None and options.memory_limit > most:  # the default for this machine
            texts = {**texts, "memory-limit": f"{most}B"}
        return merged(texts, self.defaults)


def own_attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    """The attributes that a user or a StorageClass wrote, without those that Kubernetes adds."""
    return {key: value for key, value in attributes.items() if not key.startswith(ADDED_KEYS)}


def source_of(attributes: Mapping[str, str]) -> SourceUrl:
    """The source that the attributes name, in one part or in two.

    Raises:
        InvalidArgumentError: there is none, or it is invalid.
    """
    given = {key: attributes[key] for key in _SOURCE_KEYS if attributes.get(key)}
    buckets = [key for key in ("source", "bucket", "bucketName") if key in given]
    if len(buckets) != 1 or ("source" in given and "prefix" in given):
        found = f"found {', '.join(given)}" if given else "found none of them"
        raise InvalidArgumentError(
            "a volume needs the attribute source (s3://BUCKET/PREFIX), or bucket and, if wanted, "
            f"prefix; {found}"
        )
    text = given[buckets[0]]
    if buckets[0] != "source":
        if "/" in text:
            raise InvalidArgumentError(
                f"{buckets[0]}: {text!r} is not allowed: the name of a bucket, without s3:// or /"
            )
        text = f"s3://{text}/{given.get('prefix', '').removeprefix('/')}"
    if has_control_characters(text):
        raise InvalidArgumentError(f"{buckets[0]}: {text!r} has control characters")
    try:
        return SourceUrl.parse(text)
    except OptionError as error:
        raise InvalidArgumentError(str(error)) from None


def credentials_of(secrets: Mapping[str, str]) -> StaticCredentials | None:
    """Keys from the secrets of a call; None if the call has none.

    White space around a value, such as the newline at the end of many Secrets, is removed. Other
    keys of the Secret are ignored. A Secret without keys of ours is refused, because the source
    would then be read with other credentials.

    Raises:
        InvalidArgumentError: keys are missing or malformed; no value is in the message.
    """
    own = own_attributes(secrets)
    if not own:
        return None
    check_size("the secret", own)
    found: dict[str, str] = {}
    for name, spellings in _SECRET_KEYS.items():
        values = {own[each].strip() for each in spellings if own.get(each, "").strip()}
        if len(values) > 1:
            raise InvalidArgumentError(f"the secret has {spellings[0]} twice, with other values")
        for value in values:
            if not (value.isascii() and value.isprintable()):
                raise InvalidArgumentError(
                    f"{spellings[0]} of the secret has characters that no key has"
                )
            found[name] = value
    missing = [
        f"{_SECRET_KEYS[name][0]} (or {_SECRET_KEYS[name][1]})"
        for name in ("access_key_id", "secret_access_key")
        if name not in found
    ]
    if missing:
        raise InvalidArgumentError(
            f"the secret has no {' and no '.join(missing)}; its keys are {', '.join(sorted(own))}"
        )
    return StaticCredentials(**found)


def _unknown(what: str, key: str) -> str:
    known = [*_SOURCE_KEYS, *_OTHER_KEYS, *_BY_CAMEL_CASE]
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}?" if near else "see docs/OPTIONS.md and docs/CSI.md for all"
    return f"{what} {key!r} is unknown; {hint}"


def _wait_for(text: str | None) -> str | None:
    if text and text not in WAIT_FOR:
        raise InvalidArgumentError(f"waitFor: {text!r} is not allowed: {' or '.join(WAIT_FOR)}")
    return text or None


def _role_arn(text: str | None) -> str | None:
    if text and not _ROLE_ARN.fullmatch(text):
        raise InvalidArgumentError(
            f"roleArn: {text!r} is not allowed: a role such as arn:aws:iam::123456789012:role/NAME"
        )
    return text or None


def options_of(names: str) -> frozenset[str]:
    """Option names of a list of camelCase names, separated by commas (`--allow-attributes`).

    Raises:
        OptionError: a name is unknown.
    """
    found: list[Option] = []
    for name in filter(None, (each.strip() for each in names.split(","))):
        if name not in _BY_CAMEL_CASE:
            raise OptionError(f"--allow-attributes: {_unknown('attribute', name)}")
        found.append(_BY_CAMEL_CASE[name])
    return frozenset(option.name for option in found)
