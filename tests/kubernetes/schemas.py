"""What an API server with KubeRay's resources would say of a manifest: unknown fields, wrong types, what is missing.

Core kinds go by Kubernetes' own OpenAPI, RayJob and RayCluster by KubeRay's own CRDs. Not evaluated: the CRDs' CEL
rules, which concern fields that k5dist does not write (see `CEL_FIELDS`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

VARIABLE = "K5DIST_KUBERAY_CRDS"
_BESIDE = Path(__file__).parents[2].parent / "shared" / "data" / "kuberay-crds"
RAY_KINDS = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}
CEL_FIELDS = ("deletionStrategy", "managedBy", "gcsFaultToleranceOptions")
CRDS = Path(os.environ.get(VARIABLE) or _BESIDE)

needs_crds = pytest.mark.skipif(
    not (CRDS / "ray.io_rayjobs.yaml").is_file(),
    reason=f"KubeRay's CRDs are not in {CRDS}: set {VARIABLE} to its helm-chart/kuberay-operator/crds",
)


def problems(manifest: dict[str, Any]) -> list[str]:
    """Every complaint, with the path to it; [] for a manifest that the server takes."""
    kind = manifest.get("kind", "")
    if kind not in RAY_KINDS:
        return _core_problems(manifest)
    found = jsonschema.Draft202012Validator(_schema(kind)).iter_errors(manifest)
    said = [f"{error.json_path}: {error.message[:300]}" for error in found]
    # A CRD says only that metadata is an object; the server knows its fields from elsewhere.
    stand_in = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest.get("metadata", {})}
    return said + _core_problems(stand_in)


def fields_with_rules(node: Any, path: str = "") -> Iterator[str]:
    """Paths of a structural schema's fields that have CEL rules."""
    if isinstance(node, dict):
        if isinstance(node.get("x-kubernetes-validations"), list):
            yield path
        for key, child in node.items():
            yield from fields_with_rules(child, f"{path}.{key}")
    elif isinstance(node, list):
        for child in node:
            yield from fields_with_rules(child, path)


def _core_problems(manifest: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{manifest.get('apiVersion')}/{manifest.get('kind')}: {error}"]
    return []


@functools.cache
def structural(kind: str) -> dict[str, Any]:
    """The schema of the version that is stored, as the CRD has it."""
    text = (CRDS / f"ray.io_{RAY_KINDS[kind]}.yaml").read_text()
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in crd["spec"]["versions"] if version["storage"])
    assert version["name"] == "v1"
    return version["schema"]["openAPIV3Schema"]


@functools.cache
def _schema(kind: str) -> dict[str, Any]:
    schema = strict(structural(kind))
    schema["properties"]["metadata"] = {"type": "object"}
    schema["properties"]["apiVersion"] = {"const": "ray.io/v1"}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return schema


def strict(node: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema that takes no unknown field."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    # Names of fields may be words of the schema language, so `properties` is walked apart.
    out = {
        key: strict(value)
        for key, value in node.items()
        if key not in ("properties", "required", "description", "default", "format", "nullable")
        and not key.startswith("x-kubernetes")
    }
    if node.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in node:
        out["properties"] = {name: strict(child) for name, child in node["properties"].items()}
        # The server fills in what has a default before it looks for what is missing.
        required = [name for name in node.get("required", []) if "default" not in node["properties"].get(name, {})]
        if required:
            out["required"] = required
    closed = node.get("type") == "object" and "additionalProperties" not in node
    if closed and not node.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out
