"""The container files: they name what is there, and the manifest is what its operator takes."""

import re
import shutil
import subprocess
import tomllib

import pytest
import yaml

from partialfc.config import load
from tests.support.places import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
APPTAINER = (ROOT / "partialfc.def").read_text()
MANIFEST = ROOT / "configs" / "kubernetes" / "pytorchjob.yaml"
INSIDE = "/opt/partialfc/"


def copied():
    """Files and folders that each of the two takes from the checkout."""
    lines = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
    files = re.findall(rf"^    (\S+) {INSIDE}(\S+)$", APPTAINER, re.MULTILINE)
    assert all(source == there for source, there in files)
    return {path for line in lines for path in line.split()}, {source for source, _ in files}


def test_both_images_hold_the_same_and_all_of_it_is_there():
    docker, apptainer = copied()
    assert docker == apptainer
    for name in docker:
        assert (ROOT / name).exists(), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "constraints.txt"} <= docker


def test_both_images_install_the_same_tested_packages():
    installs, others = (
        sorted(re.findall(r"pip install (.*?);? *\\?$", text, re.MULTILINE))
        for text in (DOCKERFILE, APPTAINER)
    )
    assert installs == others
    assert all(line.startswith("--constraint constraints.txt") for line in installs)
    extras = {
        extra
        for line in installs
        for found in re.findall(r"\[(.*)\]", line)
        for extra in found.split(",")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras == set(project["optional-dependencies"]) - {"dev"}
    bases = re.findall(r"^F[Rr][Oo][Mm]:? (\S+)$", f"{DOCKERFILE}\n{APPTAINER}", re.MULTILINE)
    assert len(set(bases)) == 1
    assert "gcc libc6-dev" in DOCKERFILE, "Triton compiles at the first step"
    assert "gcc libc6-dev" in APPTAINER


@pytest.mark.slow
def test_the_image_for_cpus_is_built_and_trains_nothing_but_helps():
    if shutil.which("docker") is None or subprocess.run(["docker", "info"]).returncode:
        pytest.skip("no docker daemon")
    built = ["docker", "build", "--quiet", "--build-arg", "VARIANT=cpu", "."]
    image = subprocess.run(built, cwd=ROOT, capture_output=True, text=True, check=True, timeout=500)
    words = ["docker", "run", "--rm", image.stdout.strip(), "partialfc", "--version"]
    assert subprocess.run(words).returncode == 0


NAMED = {"name": str}
CONTAINER = {
    **NAMED,
    "image": str,
    "command": [str],
    "env": [{**NAMED, "value": str}],
    "resources": {"requests": {str: str}, "limits": {str: str}},
    "volumeMounts": [{**NAMED, "mountPath": str}],
}
VOLUME = {
    **NAMED,
    "persistentVolumeClaim?": {"claimName": str},
    "emptyDir?": {"medium": str, "sizeLimit": str},
}
POD = {"terminationGracePeriodSeconds": int, "containers": [CONTAINER], "volumes": [VOLUME]}
REPLICAS = {"replicas": int, "restartPolicy": str, "template": {"spec": POD}}
PYTORCHJOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {**NAMED, "labels?": {str: str}},
    "spec": {
        "nprocPerNode": str,
        "runPolicy": {"cleanPodPolicy": str, "backoffLimit": int},
        "elasticPolicy": {
            "rdzvBackend": str,
            "minReplicas": int,
            "maxReplicas": int,
            "maxRestarts": int,
        },
        "pytorchReplicaSpecs": {"Worker": REPLICAS},
    },
}
"""What is used of kubeflow.org/v1 PyTorchJob and of a pod, with their types; "?" may be absent."""


def wrong(value, schema, at=""):
    """Yield what of a document is not as its schema says."""
    if isinstance(schema, type):
        if type(value) is not schema:
            yield f"{at}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield f"{at}: no list"
            return
        for number, item in enumerate(value):
            yield from wrong(item, schema[0], f"{at}[{number}]")
    elif not isinstance(value, dict):
        yield f"{at}: no mapping"
    elif str in schema:
        for key, item in value.items():
            yield from wrong(key, str, at)
            yield from wrong(item, schema[str], f"{at}.{key}")
    else:
        known = {key.rstrip("?"): item for key, item in schema.items()}
        needed = {key for key in schema if not key.endswith("?")}
        yield from (f"{at}: unknown {key}" for key in value.keys() - known.keys())
        yield from (f"{at}: {key} is missing" for key in needed - value.keys())
        for key in value.keys() & known.keys():
            yield from wrong(value[key], known[key], f"{at}.{key}")


def manifest(text=None):
    return yaml.safe_load(text or MANIFEST.read_text())


def test_the_manifest_is_as_its_operator_takes_it():
    assert list(wrong(manifest(), PYTORCHJOB)) == []
    text = MANIFEST.read_text()
    for right, broken in (
        ('"8"', "8"),
        ("replicas: 4\n", 'replicas: "4"\n'),
        ("volumes:", "vols:"),
    ):
        assert right in text
        assert list(wrong(manifest(text.replace(right, broken)), PYTORCHJOB)), broken
    with_kueue = text.replace("  # labels: {", "  labels: {")
    assert list(wrong(manifest(with_kueue), PYTORCHJOB)) == []
    assert "kueue.x-k8s.io/queue-name" in manifest(with_kueue)["metadata"]["labels"]


def test_the_manifest_gives_a_run_what_it_needs():
    job = manifest()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    worker, elastic = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator looks for it"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == spec["nprocPerNode"]
    env = {item["name"]: item["value"] for item in container["env"]}
    seconds = int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 30 < seconds < pod["terminationGracePeriodSeconds"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    launcher, module, partialfc, train, settings, *overrides = container["command"]
    assert (launcher, module, partialfc, train) == ("torchrun", "-m", "partialfc", "train")
    assert settings.startswith(INSIDE)
    config = load(ROOT / settings.removeprefix(INSIDE), overrides)
    for path in (config.run.folder, *config.data.train):
        assert any(path.is_relative_to(mount) for mount in mounts)
