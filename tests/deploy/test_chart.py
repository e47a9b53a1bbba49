"""The chart and the manifests rendered from it."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import schemas
import yaml
from manifests import CHART, PLAIN, ROOT, Object, PodSpec, load, named, option, pod_specs

from csi.cli import main as csi_programs
from lazyfs.cli import main as lazyfs_commands
from lazyfs.cli.settings import settings
from lazyfs.fleet.settings import FleetSettings
from lazyfs.machine import LEAST_MEMORY
from lazyfs.options.layers import environment_layer
from lazyfs.options.mount_options import OPTIONS, MountOptions, find_option
from lazyfs.options.option_types import Size

# Building helm takes some minutes the first time.
pytestmark = pytest.mark.timeout(900)

Render = Callable[..., list[Object]]
# Everything that can be switched on, at once.
EVERYTHING = (
    "createNamespace=true",
    "priorityQuota=true",
    'networkPolicy.metricsFrom=[{"namespaceSelector":{}}]',
    "monitoring.podMonitor=true",
    "monitoring.alerts=true",
    "monitoring.dashboard=true",
    "fleetCache.enabled=true",
    'fleetCache.origins=["https://minio.local","https://*.s3.eu-west-1.amazonaws.com"]',
    "fleetCache.tlsSecret=fleet",
    'fleetCache.podLabels={"a":"b"}',
    'fleetCache.podAnnotations={"a":"b"}',
    'fleetCache.extraVolumes=[{"name":"ca","configMap":{"name":"ca"}}]',
    'fleetCache.extraVolumeMounts=[{"name":"ca","mountPath":"/ca"}]',
    'controller.secrets=[{"namespace":"models","name":"s3"}]',
    "controller.readAllSecrets=true",
    "node.hostNetwork=true",
    'imagePullSecrets=["mirror"]',
    'node.podLabels={"a":"b"}',
    'node.podAnnotations={"a":"b"}',
    'node.env=[{"name":"AWS_CA_BUNDLE","value":"/ca/ca.crt"}]',
    'node.extraVolumes=[{"name":"ca","configMap":{"name":"ca"}}]',
    'node.extraVolumeMounts=[{"name":"ca","mountPath":"/ca"}]',
    'node.serviceAccountAnnotations={"eks.amazonaws.com/role-arn":"arn:aws:iam::1:role/r"}',
    'volumes.allowAttributes=["prefetch","memoryLimit"]',
    'volumes.defaults={"endpointUrl":"https://minio.local","noSignRequest":true,"memoryLimit":"1GiB"}',
    "volumes.inlineNodeRole=true",
    'cache.disks=[{"hostPath":{"path":"/mnt/a","type":"DirectoryOrCreate"}},'
    '{"ephemeral":{"volumeClaimTemplate":{"spec":{"accessModes":["ReadWriteOnce"],'
    '"storageClassName":"local-nvme","resources":{"requests":{"storage":"1000Gi"}}}}}},'
    '{"emptyDir":{"medium":"Memory","sizeLimit":"64Gi"}}]',
)


def plain() -> list[Object]:
    return load(PLAIN.read_text())


def pods(objects: list[Object]) -> dict[str, PodSpec]:
    return {spec.owner.rpartition("-")[2]: spec for spec in pod_specs(objects)}


def test_lint(helm: str) -> None:
    subprocess.run([helm, "lint", "--strict", CHART], check=True, timeout=60)


def test_committed_manifests_are_what_the_chart_renders(helm: str, tmp_path: Path) -> None:
    subprocess.run([ROOT / "deploy" / "render.sh", tmp_path], check=True, timeout=60)
    assert (tmp_path / PLAIN.name).read_text() == PLAIN.read_text(), "run deploy/render.sh"


def test_committed_manifests_are_valid() -> None:
    """For the versions that their first line names."""
    for version in schemas.supported(PLAIN.read_text()):
        for each in plain():
            schemas.check(each, version)


def test_the_api_server_warns_of_nothing() -> None:
    """It warns of tokens among the attributes (registry/storage/csidriver/strategy.go)."""
    assert named(plain(), "CSIDriver")["spec"]["serviceAccountTokenInSecrets"] is True


@pytest.mark.parametrize("version", [schemas.OLDEST, schemas.NEWEST])
@pytest.mark.parametrize("values", [(), EVERYTHING], ids=["defaults", "everything"])
def test_the_chart_renders_valid_manifests(
    render: Render, values: tuple[str, ...], version: str
) -> None:
    objects = render(*values, version=f"{version}.0")
    assert len(objects) > 10
    for each in objects:
        schemas.check(each, version)


def test_the_scheduler_waits_for_the_driver_where_it_can(render: Render) -> None:
    new = named(render(version="1.36.0"), "CSIDriver")["spec"]
    assert new["preventPodSchedulingIfMissing"] is True
    assert "preventPodSchedulingIfMissing" not in named(render(), "CSIDriver")["spec"]


def test_tokens_are_secrets_where_kubernetes_can(render: Render) -> None:
    new = named(render(version="1.35.0"), "CSIDriver")["spec"]
    assert new["serviceAccountTokenInSecrets"] is True
    assert "serviceAccountTokenInSecrets" not in named(render(), "CSIDriver")["spec"]
    without = named(render("csiDriver.tokenAudiences=[]", version="1.35.0"), "CSIDriver")["spec"]
    assert not {"tokenRequests", "serviceAccountTokenInSecrets"} & without.keys()


def test_every_image_can_come_from_a_mirror(render: Render) -> None:
    mirrored = render(
        *(f"images.{name}.registry=mirror.local" for name in ("lazyfs", "provisioner"))
    )
    images = {each["image"] for spec in pod_specs(mirrored) for each in spec.containers}
    assert len(images) == 2
    assert all(image.startswith("mirror.local/") for image in images)


def test_a_missing_registry_is_refused_and_named(render: Render) -> None:
    """There is no default, which somebody else could own."""
    with pytest.raises(ValueError, match=r"images\.lazyfs\.registry is not set: name the registry"):
        render("images.lazyfs.registry=")


def test_policies_let_probes_and_metrics_in_and_nothing_else(render: Render) -> None:
    objects = render()
    policies = {
        each["metadata"]["name"].rpartition("-")[2]: each["spec"]
        for each in objects
        if each["kind"] == "NetworkPolicy"
    }
    assert set(policies) == {"node", "controller", "keeper"}
    for name, spec in pods(objects).items():
        served = {p["name"] for c in spec.containers for p in c.get("ports", [])}
        rules = policies[name].get("ingress", [])
        assert {p["port"] for rule in rules for p in rule["ports"]} == served
        assert "Ingress" in policies[name]["policyTypes"]
        assert not any("from" in rule for rule in rules)
    assert not [each for each in render("networkPolicy.enabled=false") if "Policy" in each["kind"]]


def test_a_digest_overrides_a_tag(render: Render) -> None:
    digest = "sha256:" + "a" * 64
    node = pods(render(f"images.lazyfs.digest={digest}"))["node"]
    assert node.container("lazyfs")["image"].endswith(f"/lazyfs@{digest}")


def test_defaults_of_volumes_are_options_of_lazyfs(render: Render) -> None:
    found = pods(render(*EVERYTHING))
    for name in ("node", "controller"):
        given = {
            each["name"]: each.get("value", "") for each in found[name].container("lazyfs")["env"]
        }
        options = MountOptions.parse(("{environment}", environment_layer(given)))
        assert options.endpoint_url == "https://minio.local"
        assert options.no_sign_request
        of_mounts = {o.environment for o in OPTIONS} | {"LAZYFS_RUNTIME_DIR"}
        assert {n for n in given if n.startswith("LAZYFS_")} <= of_mounts


@pytest.mark.parametrize(
    ("value", "named_place"),
    [
        ("cache.size=lots", "/cache/size"),
        ("node.updateStrategy.rollingUpdate.maxSurge=1", "maxSurge"),
        ("nodes.hostNetwork=true", "nodes"),
        ("driverName=Not A Name", "/driverName"),
        ("kubeletDir=/var/lib/kubelet/", "/kubeletDir"),
        ("csiDriver.tokenExpirationSeconds=60", "/csiDriver/tokenExpirationSeconds"),
        ('cache.disks=["/var/cache"]', "/cache/disks/0"),
    ],
)
def test_a_wrong_value_is_refused_and_named(render: Render, value: str, named_place: str) -> None:
    with pytest.raises(ValueError, match=named_place):
        render(value)


def test_every_value_is_explained_and_has_a_schema() -> None:
    """Each line of values.yaml stands below a comment, and schema and values have the same keys."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(_keys(values, schema)) == set(_schema_keys(schema)) - {"global"}
    explained = False
    for line in (CHART / "values.yaml").read_text().splitlines():
        if not line.strip():
            explained = False
        elif line.lstrip().startswith("#"):
            explained = True
        elif not line.startswith("  "):
            assert explained, f"values.yaml: no comment above: {line}"


def _keys(values: Any, schema: Object, path: str = "") -> Iterator[str]:
    for key, value in values.items():
        below = schema.get("properties", {}).get(key, {})
        if below.get("properties") and "additionalProperties" in below and isinstance(value, dict):
            yield from _keys(value, below, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _schema_keys(schema: Object, path: str = "") -> Iterator[str]:
    for key, below in schema["properties"].items():
        if below.get("properties"):
            yield from _schema_keys(below, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def all_pods(objects: list[Object]) -> Iterator[tuple[PodSpec, Object]]:
    for spec in pod_specs(objects):
        for container in spec.containers:
            yield spec, container


@pytest.mark.parametrize("values", [(), EVERYTHING], ids=["defaults", "everything"])
def test_our_programs_accept_their_arguments(render: Render, values: tuple[str, ...]) -> None:
    """Parsed by the commands themselves."""
    seen = set()
    for _, container in all_pods(render(*values)):
        if "/lazyfs" in container["image"] and "args" in container:
            program, command, *arguments = container["args"]
            programs = {"lazyfs-csi": csi_programs, "lazyfs": lazyfs_commands}[program]
            with click.Context(programs) as parent:
                found = programs.get_command(parent, command)
                assert found is not None, command
                given = found.make_context(command, list(arguments), parent=parent).params
                # The values of mount options are read by lazyfs, not by click.
                settings(None, {name: v for name, v in given.items() if find_option(name)})
            seen.add(command)
    assert seen - {"fleet-cache"} == {"node", "keeper", "controller"}
    assert ("fleet-cache" in seen) == bool(values)


def test_fleet_cache_and_node_plugins_meet(render: Render) -> None:
    objects = render(*EVERYTHING)
    found = pods(objects)
    settings = tomllib.loads(named(objects, "ConfigMap", "-fleet")["data"]["fleet.toml"])
    parsed = FleetSettings.of({**settings, "address": "10.0.0.1"}, "fleet.toml")
    asked = option(found["node"].container("lazyfs")["args"], "fleet-cache")
    assert asked == parsed.door
    path = asked.removeprefix("unix:")
    assert found["node"].host_path("lazyfs", path) == found["fleet"].host_path("fleet", path)
    assert (
        found["fleet"].host_path("fleet", str(parsed.cache_dir)) == "/var/cache/lazyfs-fleet/shelf"
    )
    service = named(objects, "Service", "-fleet")
    assert parsed.members_dns == f"{service['metadata']['name']}.lazyfs.svc"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert [each["containerPort"] for each in found["fleet"].container("fleet")["ports"]] == [
        parsed.shelf_port
    ]
    # What decides who may read is written by one user alone, and in memory.
    assert str(parsed.run_dir.parent) in found["fleet"].empty_dirs("fleet")
    assert str(parsed.run_dir) not in found["fleet"].empty_dirs("fleet")
    for key in ("nodeSelector", "tolerations", "affinity"):
        assert found["node"].spec[key] == found["fleet"].spec[key]
    policy = named(objects, "NetworkPolicy", "-fleet")["spec"]
    assert policy["ingress"][0]["from"] == [{"podSelector": policy["podSelector"]}]


def test_a_fleet_cache_needs_its_stores(render: Render) -> None:
    assert not any("fleet" in each["metadata"]["name"] for each in render())
    with pytest.raises(ValueError, match="/fleetCache/origins"):
        render("fleetCache.enabled=true")


def test_every_reference_exists(render: Render) -> None:
    for spec, container in all_pods(render(*EVERYTHING)):
        volumes = {each["name"] for each in spec.spec.get("volumes", [])}
        assert {each["name"] for each in container.get("volumeMounts", [])} <= volumes, spec.owner
        ports = {each["name"] for each in container.get("ports", [])}
        for probe in ("livenessProbe", "readinessProbe"):
            if probe in container:
                (way,) = container[probe].keys() & {"httpGet", "tcpSocket"}
                assert container[probe][way]["port"] in ports
        arguments = container.get("args", [])
        if ports - {"shelf"} and "/lazyfs" in container["image"]:
            port = option(arguments, "http-address").rpartition(":")[2]
            assert [int(port)] == [each["containerPort"] for each in container["ports"]]


def test_monitoring_and_policies_select_our_pods(render: Render) -> None:
    objects = render(*EVERYTHING)
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in objects
        if "template" in each.get("spec", {})
    }
    ports = {p["name"] for _, c in all_pods(objects) for p in c.get("ports", [])}
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    assert len(policies) == 4
    for policy in policies:
        wanted = policy["spec"]["podSelector"]["matchLabels"].items()
        assert [n for n, has in labels.items() if wanted <= has.items()] == [
            policy["metadata"]["name"]
        ]
    monitor = named(objects, "PodMonitor")["spec"]
    assert {each["port"] for each in monitor["podMetricsEndpoints"]} == ports - {"shelf"}
    for rule in monitor["selector"]["matchExpressions"]:
        for name in ("lazyfs-csi-node", "lazyfs-csi-controller"):
            assert labels[name][rule["key"]] in rule["values"]


def test_node_plugin_keeper_and_kubelet_meet() -> None:
    """The same sockets and directories of the node, whatever they are called in a container."""
    found = pods(plain())
    node, keeper = found["node"], found["keeper"]
    plugin = node.container("lazyfs")
    # kubelet connects to the path that the plugin names.
    endpoint = option(plugin["args"], "endpoint").removeprefix("unix://")
    assert node.host_path("lazyfs", endpoint) == endpoint
    registry = option(plugin["args"], "registration-dir")
    assert node.host_path("lazyfs", registry) == registry == "/var/lib/kubelet/plugins_registry"
    assert node.host_path("lazyfs", option(plugin["args"], "keeper")) == keeper.host_path(
        "keeper", option(keeper.container("keeper")["args"], "socket")
    )
    # kubelet names paths as they are on the node.
    assert node.host_path("lazyfs", "/var/lib/kubelet/pods") == "/var/lib/kubelet/pods"
    (kubelet,) = (each for each in plugin["volumeMounts"] if each["name"] == "kubelet")
    assert kubelet["mountPropagation"] == "Bidirectional"
    assert plugin["securityContext"]["privileged"] is True
    # Daemons mount where the next plugin sees it, by the same name.
    state = option(plugin["args"], "state-dir")
    assert Path(state).is_relative_to(kubelet["mountPath"])
    assert node.host_path("lazyfs", state) == state


def test_records_of_mounts_are_below_an_empty_dir() -> None:
    """Anybody may write to the directory of an emptyDir itself, and the daemons refuse that."""
    node = pods(plain())["node"]
    given = {each["name"]: each.get("value") for each in node.container("lazyfs")["env"]}
    runtime = Path(str(given["LAZYFS_RUNTIME_DIR"]))
    assert any(runtime.is_relative_to(each) for each in node.empty_dirs("lazyfs"))
    assert str(runtime) not in node.empty_dirs("lazyfs")


def test_an_upgrade_leaves_the_keeper_alone() -> None:
    keeper = named(plain(), "DaemonSet", "-keeper")["spec"]
    assert keeper["updateStrategy"] == {"type": "OnDelete"}
    assert named(plain(), "DaemonSet", "-node")["spec"]["updateStrategy"]["type"] == "RollingUpdate"


def test_a_keeper_runs_on_every_node_of_the_plugin(render: Render) -> None:
    found = pods(render('node.nodeSelector={"nvidia.com/gpu.present":"true"}'))
    for key in ("nodeSelector", "tolerations", "affinity"):
        assert found["node"].spec[key] == found["keeper"].spec[key]
    # Whatever taints GPU nodes have.
    assert {"operator": "Exists"} in found["node"].spec["tolerations"]


def test_the_node_plugin_has_memory_for_volumes_at_their_defaults() -> None:
    """Four volumes; twice the blocks' memory was measured at the peak of a load."""
    request = pods(plain())["node"].container("lazyfs")["resources"]["requests"]["memory"]
    assert Size(0, 1 << 50).parse(f"{request}B") >= 4 * 2 * LEAST_MEMORY


def test_only_the_controller_may_ask_the_api_server(render: Render) -> None:
    objects = render()
    for kind in ("ClusterRoleBinding", "RoleBinding"):
        for each in (each for each in objects if each["kind"] == kind):
            assert [s["name"] for s in each["subjects"]] == ["lazyfs-csi-controller"]
    for name in ("node", "keeper"):
        assert pods(objects)[name].spec["automountServiceAccountToken"] is False


def test_secrets_are_read_only_where_a_value_says_so(render: Render) -> None:
    def rules(objects: list[Object]) -> list[Object]:
        return [
            rule
            for each in objects
            if each["kind"] in ("Role", "ClusterRole")
            for rule in each["rules"]
            if "secrets" in rule["resources"]
        ]

    assert rules(render()) == []
    (rule,) = rules(render('controller.secrets=[{"namespace":"models","name":"s3"}]'))
    assert rule["resourceNames"] == ["s3"]
    assert rule["verbs"] == ["get"]
    # Nothing may be done with everything of anything.
    everything = [r for o in objects_with_rules(render(*EVERYTHING)) for r in o["rules"]]
    assert not any("*" in rule["verbs"] + rule["resources"] for rule in everything)


def objects_with_rules(objects: list[Object]) -> list[Object]:
    return [each for each in objects if each["kind"] in ("Role", "ClusterRole")]


def test_only_the_node_plugin_is_privileged() -> None:
    for spec, container in all_pods(plain()):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        if (spec.owner.endswith("-node"), container["name"]) == (True, "lazyfs"):
            continue
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["allowPrivilegeEscalation"] is False


def test_without_disks_there_is_no_disk_cache(render: Render) -> None:
    arguments = pods(render("cache.disks=[]"))["node"].container("lazyfs")["args"]
    assert option(arguments, "cache-dir") == "none"


def test_without_a_controller_none_of_its_objects_exist(render: Render) -> None:
    text = json.dumps(render("controller.enabled=false"))
    assert "provisioner" not in text
    assert "lazyfs-csi-controller" not in text
