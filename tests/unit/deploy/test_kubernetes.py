"""deploy/kubernetes/ is valid by the schemas of Kubernetes, hardened, and fits ganq's own limits."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage.settings import SECRETS, Settings

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes"
VERSION = "1.33"


def documents(folder: str) -> list[dict[str, Any]]:
    """Return the resources that a folder's kustomization names, those of its bases included."""
    kustomization = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
    found = []
    for name in kustomization["resources"]:
        path = (FOLDER / folder / name).resolve()
        if path.is_dir():
            found += documents(str(path.relative_to(FOLDER)))
        else:
            found += [one for one in yaml.safe_load_all(path.read_text()) if one is not None]
    return found


def pod_of(one: dict[str, Any]) -> dict[str, Any] | None:
    spec = one.get("spec", {})
    spec = spec.get("jobTargetRef", spec)
    pod: dict[str, Any] | None = spec.get("template", {}).get("spec")
    return pod


ALL = documents("workers") + [one for one in documents("autoscaled") if one not in documents("base")]
PODS = [
    pytest.param(pod, id=f"{one['kind']}-{one['metadata']['name']}") for one in ALL if (pod := pod_of(one))
]
WORKERS = [one for one in PODS if "worker" in str(one.id)]


def test_every_file_belongs_to_a_kustomization() -> None:
    named = set()
    for path in FOLDER.glob("*/kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        named |= {path, *((path.parent / name) for name in kustomization["resources"])}
        named |= {path.parent / name for name in kustomization.get("configurations", ())}
    assert set(FOLDER.rglob("*.yaml")) == {path for path in named if path.suffix == ".yaml"}


@pytest.mark.parametrize("one", ALL, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_a_manifest_is_valid(one: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    if one["apiVersion"].startswith("keda.sh/"):
        assert one["kind"] in ("ScaledJob", "TriggerAuthentication")
        if one["kind"] == "TriggerAuthentication":
            return
        job = {**one["spec"]["jobTargetRef"]}  # KEDA makes Jobs of it
        one = {"apiVersion": "batch/v1", "kind": "Job", "metadata": one["metadata"], "spec": job}
    validate.validate(one, VERSION, strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    deployment = next(one for one in ALL if one["kind"] == "Deployment")
    wrong = {**deployment, "spec": {**deployment["spec"], "replica": 2}}
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, VERSION, strict=True)


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_satisfies_the_restricted_pod_security_standard(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
    assert all("hostPath" not in volume for volume in pod["volumes"])


@pytest.mark.parametrize("pod", PODS)
def test_what_a_pod_writes_to_and_reads_secrets_from_is_mounted(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert "emptyDir" in mounts["/tmp"]
    assert mounts["/run/secrets/ganq"]["secret"]["secretName"] == "ganq-urls"
    assert len(mounts) == len(volumes)


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_runs_a_command_of_ganq(pod: dict[str, Any]) -> None:
    from test_docs import parse

    (container,) = pod["containers"]
    parse(["ganq", *container["args"]])
    for probe in ("startupProbe", "livenessProbe"):
        if probe in container:
            parse(container[probe]["exec"]["command"])


@pytest.mark.parametrize("pod", WORKERS)
def test_a_worker_is_given_the_time_to_save_its_job(pod: dict[str, Any]) -> None:
    assert pod["terminationGracePeriodSeconds"] > Settings.drain_seconds + 30  # as long as the launcher waits
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_the_settings_are_ganqs_and_hold_no_secret() -> None:
    (generator,) = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())["configMapGenerator"]
    given = dict(literal.split("=", 1) for literal in generator["literals"])
    names = {f"GANQ_{name.upper()}" for name in Settings.__dataclass_fields__}
    files = {f"GANQ_{name.upper()}_FILE" for name in SECRETS}
    assert set(given) <= names | files
    assert not {f"GANQ_{name.upper()}" for name in SECRETS} & set(given)
    assert float(given["GANQ_DRAIN_SECONDS"]) == Settings.drain_seconds
    assert "kind: Secret" not in "".join(path.read_text() for path in FOLDER.rglob("*.yaml"))


def test_the_volume_can_be_mounted_by_all_workers() -> None:
    (claim,) = [one for one in ALL if one["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


# --- KEDA ---------------------------------------------------------------------------------


@pytest.fixture
def scaled() -> dict[str, Any]:
    (found,) = [one for one in ALL if one["kind"] == "ScaledJob"]
    return found


def test_keda_creates_workers_that_end_when_they_are_idle(scaled: dict[str, Any]) -> None:
    pod = pod_of(scaled)
    assert pod is not None
    assert "--exit-when-idle" in pod["containers"][0]["args"]
    assert pod["restartPolicy"] == "Never"
    assert scaled["spec"]["rollout"] == {"strategy": "gradual"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["workers", "autoscaled"])
def test_kustomize_builds_a_folder_and_resolves_image_and_settings(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    built = list(yaml.safe_load_all(done.stdout))
    (settings,) = [one["metadata"]["name"] for one in built if one["kind"] == "ConfigMap"]
    pods = [pod for one in built if (pod := pod_of(one))]
    assert len(pods) == 2
    for container in (pod["containers"][0] for pod in pods):
        assert container["image"] == "registry.example.com/ganq:0.2.0"
        assert container["envFrom"] == [{"configMapRef": {"name": settings}}]
    assert {one["metadata"].get("namespace") for one in built if one["kind"] != "Namespace"} == {"ganq"}
