"""What is deployed on Kubernetes, checked without a cluster."""

import inspect
import re
from pathlib import Path

import dagster as dg
import kubernetes_validate
import pytest
import yaml

from roma_pipelines.launching.kubernetes.profile import KubernetesProfile, KubernetesSettings
from tests.env_example import SETTINGS

DEPLOY = Path(__file__).parents[2] / "deploy" / "kubernetes"
CAPTURED = Path(__file__).parents[1] / "captured" / "helm" / "dagster_values_keys.yaml"
PARTS = ("base", "services")
VALUES = yaml.safe_load((DEPLOY / "dagster" / "values.yaml").read_text())


def documents(part):
    files = [p for p in sorted((DEPLOY / part).glob("*.yaml")) if p.name != "kustomization.yaml"]
    return [d for path in files for d in yaml.safe_load_all(path.read_text())]


EVERYTHING = [document for part in PARTS for document in documents(part)]


def named(kind):
    return {d["metadata"]["name"]: d for d in EVERYTHING if d["kind"] == kind}


def pods():
    """(name, pod spec) of everything that runs."""
    for kind in ("Deployment", "StatefulSet"):
        for name, there in named(kind).items():
            yield name, there["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", ["1.31", "1.36", "1.37"])
@pytest.mark.parametrize(
    "document", EVERYTHING, ids=lambda d: f"{d['kind']} {d['metadata']['name']}"
)
def test_every_manifest_fits_the_schema_strictly(document, version):
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("part", PARTS)
def test_kustomizations_name_every_file(part):
    kustomization = yaml.safe_load((DEPLOY / part / "kustomization.yaml").read_text())
    files = {p.name for p in (DEPLOY / part).glob("*.yaml")} - {"kustomization.yaml"}
    generated = [f for c in kustomization.get("configMapGenerator", []) for f in c["files"]]

    assert set(kustomization["resources"]) == files
    assert all((DEPLOY / part / file).exists() for file in generated)


def test_pods_are_locked_up_limited_and_probed():
    for name, spec in pods():
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name
            if container["image"].startswith("roma-pipeline"):  # else Always, with the tag latest
                assert container["imagePullPolicy"] == "IfNotPresent", name
        for container in spec["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), name


def test_secrets_are_by_reference_and_the_readme_makes_each():
    readme = (DEPLOY.parent / "README.md").read_text()
    keys = set()
    for _, spec in pods():
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            for entry in container["env"]:
                if source := entry.get("valueFrom"):
                    keys.add((source["secretKeyRef"]["name"], source["secretKeyRef"]["key"]))
                else:
                    assert not re.search(r"PASSWORD|SECRET|KEY", entry["name"]), entry
    keys |= {("roma-dagster-postgres", "postgresql-password")}
    for name, key in keys:
        made = re.search(rf"create secret generic {name}\b.*?(\n\s*\n|$)", readme, re.DOTALL)
        assert made and f"--from-literal={key}=" in made[0], (name, key)
    assert "create secret generic roma-tracking" in readme
    assert named("Secret") == {}


def test_a_config_map_is_what_kustomize_makes():
    kustomization = yaml.safe_load((DEPLOY / "services" / "kustomization.yaml").read_text())
    made = {generator["name"] for generator in kustomization["configMapGenerator"]}
    used = {
        volume["configMap"]["name"]
        for _, spec in pods()
        for volume in spec.get("volumes", [])
        if "configMap" in volume
    }

    assert used == made


def test_services_and_policies_meet_at_the_same_pods_and_ports():
    policies = named("NetworkPolicy")
    for service in named("Service").values():
        part = service["spec"]["selector"]["roma-pipeline/part"]
        (port,) = [p["port"] for p in service["spec"]["ports"]]
        (rule,) = policies[part]["spec"]["ingress"]
        assert policies[part]["spec"]["podSelector"]["matchLabels"] == service["spec"]["selector"]
        assert [p["port"] for p in rule["ports"]] == [port]
    assert policies["deny-ingress"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    assert policies["training"]["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_profiles_use_what_the_base_makes():
    profile = KubernetesProfile.load("generic", KubernetesSettings())

    assert profile.service_account in named("ServiceAccount")
    assert named("ServiceAccount")[profile.service_account]["automountServiceAccountToken"] is False
    assert {v.claim for v in profile.volumes} <= named("PersistentVolumeClaim").keys()
    assert named("PersistentVolumeClaim")["roma-data"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert profile.namespace in named("Namespace")
    bound = {s["name"] for b in named("RoleBinding").values() for s in b["subjects"]}
    assert bound == {"roma-launcher"}  # the training account has no rights


def test_no_role_has_a_wildcard():
    assert named("ClusterRole") == {}
    for role in named("Role").values():
        for rule in role["rules"]:
            assert "*" not in str(rule), role["metadata"]["name"]
            assert "secrets" not in rule["resources"]


def test_dagsters_role_is_what_its_client_calls():
    """The client's own source says which requests it makes; nothing more is granted."""
    from dagster_k8s import client

    calls = set(re.findall(r"(?:batch|core)_api\.([a-z_]+)\(", inspect.getsource(client)))
    verbs = {"create": "create", "delete": "delete", "list": "list", "read": "get"}
    used = set()
    for call in calls:
        verb, resource = re.fullmatch(r"([a-z]+)_namespaced_(\w+)", call).groups()
        base, _, sub = resource.partition("_")
        used.add((f"{base}s/{sub}" if sub else f"{base}s", verbs[verb]))
    rules = named("Role")["roma-dagster"]["rules"]
    granted = {(r, v) for rule in rules for r in rule["resources"] for v in rule["verbs"]}

    assert granted == used


# -- Helm ----------------------------------------------------------------------------------------


def unknown_keys(values, known, path=""):
    if known is None or not isinstance(values, dict | list):
        return []
    if isinstance(values, list):
        return [k for n, v in enumerate(values) for k in unknown_keys(v, known[0], f"{path}[{n}]")]
    found = [f"{path}.{key}" for key in values if key not in known]
    return found + [
        k
        for key in values
        if key in known
        for k in unknown_keys(values[key], known[key], f"{path}.{key}")
    ]


def test_the_chart_knows_every_key_of_the_values():
    known = yaml.safe_load(CAPTURED.read_text())

    assert unknown_keys(VALUES, known) == []
    assert unknown_keys({"dagsterDaemon": {"runMonitor": {}}}, known) == [
        ".dagsterDaemon.runMonitor"
    ]


def test_values_refer_to_what_base_and_services_make():
    postgres = VALUES["postgresql"]
    (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
    environment = {entry["name"]: entry["value"] for entry in deployment["env"]}

    assert postgres["postgresqlHost"] in named("Service")
    assert VALUES["global"]["serviceAccountName"] in named("ServiceAccount")
    assert environment["ROMA_MLFLOW_TRACKING_URI"] == "http://tracking:5000"
    assert "tracking" in named("Service")
    assert environment["ROMA_KUBERNETES_PROFILE"] == "generic"
    claim = deployment["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim in named("PersistentVolumeClaim")
    profile = KubernetesProfile.load("generic", KubernetesSettings())
    mounts = [mount["mountPath"] for mount in deployment["volumeMounts"]]
    assert profile.holds(Path(environment["ROMA_STORAGE_ROOT"]) / "jobs")
    assert mounts == [volume.mount for volume in profile.volumes]
    for name in ("dagsterWebserver", "dagsterDaemon"):
        assert VALUES[name]["labels"] == {"roma-pipeline/part": "dagster"}
    assert deployment["labels"] == {"roma-pipeline/part": "dagster"}


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: nowhere
clusters: [{ name: nowhere, cluster: { server: "http://127.0.0.1:9" } }]
users: [{ name: me, user: {} }]
contexts: [{ name: nowhere, context: { cluster: nowhere, user: me } }]
"""


def snake(values):
    """Keys of the chart as Dagster has them; what is raw Kubernetes stays as it is."""
    return {re.sub(r"(?=[A-Z])", "_", key).lower(): value for key, value in values.items()}


def chart_instance(kubeconfig=None):
    """dagster.yaml as the chart's templates write it from the values, without the storages."""
    daemon = VALUES["dagsterDaemon"]
    config = VALUES["runLauncher"]["config"]["k8sRunLauncher"]
    launcher = {
        "load_incluster_config": config["loadInclusterConfig"],
        "job_namespace": "roma",
        "image_pull_policy": config["imagePullPolicy"],
        "service_account_name": VALUES["global"]["serviceAccountName"],
        "dagster_home": VALUES["global"]["dagsterHome"],
        "instance_config_map": "dagster-instance",
        "postgres_password_secret": VALUES["global"]["postgresqlSecretName"],
        "labels": config["labels"],
        **({"resources": config["resources"]} if "resources" in config else {}),
        "run_k8s_config": snake(config["runK8sConfig"]),
    }
    if kubeconfig is not None:
        launcher |= {"load_incluster_config": False, "kubeconfig_file": str(kubeconfig)}
    coordinator = {"module": "dagster._core.run_coordinator", "class": "QueuedRunCoordinator"}
    if queue := daemon["runCoordinator"]["config"]["queuedRunCoordinator"]:
        coordinator["config"] = snake(queue)
    concurrency = VALUES["concurrency"]
    document = {
        "run_launcher": {"module": "dagster_k8s", "class": "K8sRunLauncher", "config": launcher},
        "run_coordinator": coordinator,
        "run_monitoring": snake(daemon["runMonitoring"]),
        "telemetry": VALUES["telemetry"],
    }
    if concurrency["enabled"]:
        document["concurrency"] = {k: snake(concurrency[k]) for k in ("pools", "runs")}
    if daemon["runRetries"]["enabled"]:
        document["run_retries"] = snake(daemon["runRetries"])
    more = VALUES["additionalInstanceConfig"]
    assert not document.keys() & more.keys()  # a key twice is no YAML
    return document | more


def test_dagster_takes_the_instance_that_the_chart_writes(tmp_path):
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(KUBECONFIG)
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(chart_instance(kubeconfig)))

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.run_retries_enabled
        assert instance.run_retries_max_retries == 3
        assert not instance.get_settings("run_retries")["retry_on_asset_or_op_failure"]
        assert instance.run_monitoring_enabled
        concurrency = instance.get_concurrency_config()
        assert concurrency.pool_config.default_pool_limit == 1
        assert concurrency.run_queue_config.max_concurrent_runs == 10
        instance.run_coordinator  # noqa: B018  # raises if it is configured twice


def test_pods_of_runs_and_steps_are_limited_as_the_values_say(tmp_path):
    """By Dagster's own code: what the code server hands on comes after the run launcher's."""
    from dagster_k8s.container_context import K8sContainerContext
    from dagster_k8s.job import construct_dagster_k8s_job

    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(KUBECONFIG)
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(chart_instance(kubeconfig)))
    (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
    names = ("env", "labels", "resources", "volumes")
    handed_on = {name: deployment[name] for name in names} | {
        "image_pull_policy": deployment["image"]["pullPolicy"],
        "env_secrets": [secret["name"] for secret in deployment["envSecrets"]],
        "volume_mounts": deployment["volumeMounts"],
        "service_account_name": VALUES["global"]["serviceAccountName"],
        "namespace": "roma",
    }

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        launcher = instance.run_launcher
        run = instance.create_run_for_job(empty)
        context = K8sContainerContext.create_for_run(run, launcher, include_run_tags=False)
        context = context.merge(K8sContainerContext.create_from_config({"k8s": handed_on}))
        config = context.get_k8s_job_config("roma-pipeline:1", launcher)
        job = construct_dagster_k8s_job(config, [], "run", context.run_k8s_config).to_dict()

    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["enable_service_links"] is False
    assert pod["service_account_name"] == "roma-launcher"
    assert pod["security_context"]["run_as_non_root"] is True
    assert container["resources"]["limits"] == {"memory": "4Gi"}
    assert container["security_context"]["allow_privilege_escalation"] is False
    assert container["security_context"]["capabilities"]["drop"] == ["ALL"]
    assert {e["name"] for e in deployment["env"]} <= {e["name"] for e in container["env"]}


@dg.job
def empty():
    pass


def test_the_chart_grants_nothing_beside_the_base():
    """Chart and subchart each have a Role of their own, with every verb on jobs and pods."""
    assert VALUES["rbacEnabled"] is False
    assert VALUES["dagster-user-deployments"]["rbacEnabled"] is False
    assert VALUES["serviceAccount"]["create"] is False


def test_the_migration_reaches_the_database_and_can_be_repeated():
    """Its pod has no label of ours, and its Job cannot be changed by an upgrade."""
    job = f"dagster-{VALUES['dagsterWebserver']['nameOverride']}-instance-migrate"
    (rule,) = named("NetworkPolicy")["postgres"]["spec"]["ingress"]
    admitted = [source["podSelector"]["matchLabels"] for source in rule["from"]]
    readme = (DEPLOY.parent / "README.md").read_text()

    assert VALUES["migrate"]["enabled"] is True
    assert {"batch.kubernetes.io/job-name": job} in admitted
    assert f"delete job {job}" in readme


PREFIXES = [cls.model_config["env_prefix"] for cls in SETTINGS]


def test_no_service_is_named_like_a_setting():
    """Kubernetes adds variables named after every Service to pods that keep service links."""
    prefixes = (*PREFIXES, "MLFLOW_", "DAGSTER_WEBSERVER_", "DAGSTER_CLI_")
    webserver = f"dagster-{VALUES['dagsterWebserver']['nameOverride']}"
    for name in (*named("Service"), webserver):
        variable = f"{name.replace('-', '_').upper()}_"
        assert not variable.startswith(prefixes), name
    for name, spec in pods():
        assert spec["enableServiceLinks"] is False, name


def test_the_driver_is_the_installed_one_wherever_a_database_is_named():
    """Of `postgresql://` SQLAlchemy decides, and 2.1 takes psycopg 3."""
    found = [
        line
        for path in sorted(DEPLOY.parent.glob("**/*.yaml"))
        for line in path.read_text().splitlines()
        if re.search(r"postgresql(\+\w+)?:?//|[sS]cheme: postgresql", line)
    ]

    assert len(found) >= 4
    assert all("postgresql+psycopg2" in line for line in found), found


def test_steps_get_a_pod_of_their_own_where_the_values_say_so(monkeypatch):
    from dagster_k8s import k8s_job_executor

    from roma_pipelines.definitions import executor
    from roma_pipelines.experiment import retry_policy

    assert (executor(), retry_policy()) == (dg.in_process_executor, None)
    monkeypatch.setenv("ROMA_DAGSTER_EXECUTOR", "k8s_job")
    assert executor() is k8s_job_executor
    assert retry_policy().max_retries == 3  # a step whose pod dies finds its job again
