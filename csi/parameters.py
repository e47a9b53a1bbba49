"""Turns the parameters of a StorageClass into the attributes of one volume.

Pure. Parameters are the attributes of its volumes (`csi/volume_attributes.py`), with templates in
the names of the source:

    ${pvc.name} ${pvc.namespace} ${pv.name}     of the claim, and of the volume made for it

and two that are not passed on:

    allowedPrefixes   s3://BUCKET/PREFIX, separated by commas: a claim may choose a source below
                      them by the annotation `<driver>/source`
    checkSource       false: do not ask S3 before the volume is made (the controller cannot reach
                      or read what the nodes can)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from csi.errors import InvalidArgumentError, MendableError
from csi.request_fields import check_size
from csi.volume_attributes import own_attributes
from lazyfs.errors import OptionError
from lazyfs.options.option_types import Flag
from lazyfs.store.url import SourceUrl

# Parameters that external-provisioner adds with --extra-create-metadata.
CLAIM_NAMESPACE = "csi.storage.k8s.io/pvc/namespace"
_METADATA = {
    "pvc.name": "csi.storage.k8s.io/pvc/name",
    "pvc.namespace": CLAIM_NAMESPACE,
    "pv.name": "csi.storage.k8s.io/pv/name",
}
_TEMPLATED = ("source", "bucket", "bucketName", "prefix")
_OF_THE_CONTROLLER = ("allowedPrefixes", "checkSource")
_TEMPLATE = re.compile(r"\$\{([^}]*)\}")
# Names of Kubernetes objects; other characters could lead out of the prefix.
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a StorageClass, and the claim they are used for.

    Attributes:
        own: the StorageClass's attributes, with templates.
        names: of the claim and its volume, by template (`pvc.name`).
        allowed_prefixes: where claims may choose a source; empty: they may not choose.
        check_source: whether S3 is asked before the volume is made.
    """

    own: Mapping[str, str]
    names: Mapping[str, str]
    allowed_prefixes: tuple[SourceUrl, ...]
    check_source: bool

    @classmethod
    def read(cls, parameters: Mapping[str, str]) -> Parameters:
        """Parse those of a CreateVolume request. Raises InvalidArgumentError."""
        own = own_attributes(parameters)
        check_size("parameters", own)
        return cls(
            own=own,
            names={name: parameters[key] for name, key in _METADATA.items() if key in parameters},
            allowed_prefixes=_prefixes(own.get("allowedPrefixes", "")),
            check_source=_flag("checkSource", own.get("checkSource", "true")),
        )

    @property
    def claim(self) -> tuple[str, str]:
        """Namespace and name of the claim.

        Raises:
            InvalidArgumentError: external-provisioner did not say.
        """
        return self._name("pvc.namespace"), self._name("pvc.name")

    @property
    def names_a_source(self) -> bool:
        """Whether the StorageClass names a source."""
        return any(self.own.get(key) for key in _TEMPLATED)

    def attributes(self, chosen: str | None) -> dict[str, str]:
        """The attributes of the volume, and the namespace of its claim, by which nodes bound it.

        Args:
            chosen: the source that the claim's annotation requests, if any.

        Raises:
            MendableError: the claim may not use that source.
            InvalidArgumentError: a template has no value.
        """
        attributes = {
            key: self._filled(key, value) if key in _TEMPLATED else value
            for key, value in self.own.items()
            if key not in _OF_THE_CONTROLLER and not (chosen and key in _TEMPLATED)
        }
        if chosen:
            attributes["source"] = str(self._allowed(chosen))
        if "pvc.namespace" in self.names:
            attributes[CLAIM_NAMESPACE] = self._name("pvc.namespace")
        return attributes

    def _allowed(self, chosen: str) -> SourceUrl:
        try:
            url = SourceUrl.parse(chosen)
        except OptionError as error:
            raise MendableError(f"the claim's annotation: {error}") from None
        for allowed in self.allowed_prefixes:
            if url.bucket == allowed.bucket and url.prefix.startswith(allowed.prefix):
                return url
        raise MendableError(
            f"the claim's annotation: {chosen!r} is not allowed: the StorageClass allows sources "
            f"below {', '.join(map(str, self.allowed_prefixes))} (allowedPrefixes)"
        )

    def _filled(self, key: str, text: str) -> str:
        def value(found: re.Match[str]) -> str:
            if found[1] not in _METADATA:
                known = ", ".join(f"${{{name}}}" for name in _METADATA)
                raise InvalidArgumentError(f"{key}: {found[0]!r} is not allowed: {known}")
            return self._name(found[1])

        return _TEMPLATE.sub(value, text)

    def _name(self, name: str) -> str:
        text = self.names.get(name, "")
        if not text:
            raise InvalidArgumentError(
                f"{name} is not known here: external-provisioner must run with "
                "--extra-create-metadata"
            )
        if not _NAME.fullmatch(text):
            raise InvalidArgumentError(f"{_METADATA[name]}: {text!r} is not a Kubernetes name")
        return text


def _prefixes(text: str) -> tuple[SourceUrl, ...]:
    try:
        return tuple(SourceUrl.parse(each.strip()) for each in text.split(",") if each.strip())
    except OptionError as error:
        raise InvalidArgumentError(f"allowedPrefixes: {error}") from None


def _flag(key: str, text: str) -> bool:
    try:
        return Flag().parse(text)
    except ValueError:
        raise InvalidArgumentError(f"{key}: {text!r} is not allowed: {Flag().allowed}") from None
