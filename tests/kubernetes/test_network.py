"""The network policies of `k8s/`, evaluated: what has to speak to each other may, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

POLICIES = Path(__file__).parents[2] / "k8s" / "base" / "network.yaml"
PART = "app.kubernetes.io/component"
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
ELSEWHERE: dict[str, str] = {}  # an address that is no pod of the cluster


def policies() -> list[dict[str, Any]]:
    return [document["spec"] for document in yaml.safe_load_all(POLICIES.read_text())]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    terms = selector.get("matchExpressions", [])
    assert all(term["operator"] == "In" for term in terms)
    wanted = selector.get("matchLabels", {})
    return all(labels.get(k) == v for k, v in wanted.items()) and all(
        labels.get(t["key"]) in t["values"] for t in terms
    )


def side(direction: str, pod: dict[str, str], peer: dict[str, str], port: int, *, same_namespace: bool) -> bool:
    """Whether the policies on `pod` let this through: any rule of any policy that selects it, or no policy at all."""
    applying = [p for p in policies() if selects(p["podSelector"], pod) and direction in p["policyTypes"]]
    peers, key = ("from", "ingress") if direction == "Ingress" else ("to", "egress")
    for rule in (rule for policy in applying for rule in policy.get(key, [])):
        ports = [entry["port"] for entry in rule.get("ports", [])]
        if ports and port not in ports:
            continue
        if peers not in rule:
            return True
        for candidate in rule[peers]:
            reaches = same_namespace or "namespaceSelector" in candidate
            if reaches and peer and selects(candidate["podSelector"], peer):
                return True
    return not applying


def may(source: str, target: str, port: int) -> bool:
    """Whether a pod of k5dist, KubeRay's operator or somebody elsewhere reaches a pod of k5dist or elsewhere."""
    labels = {"operator": OPERATOR, "elsewhere": ELSEWHERE}
    ours = [name not in labels for name in (source, target)]
    pods = [labels.get(name, {PART: name}) for name in (source, target)]
    out = not ours[0] or side("Egress", pods[0], pods[1], port, same_namespace=all(ours))
    return out and (not ours[1] or side("Ingress", pods[1], pods[0], port, same_namespace=all(ours)))


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("ray", "ray", 6379),
        ("ray", "ray", 41_234),
        ("submitter", "ray", 8265),
        ("operator", "ray", 8265),
        ("ray", "mlflow", 5000),
        ("ray", "objects", 9000),
        ("mlflow", "objects", 9000),
        ("mlflow", "postgres", 5432),
        ("ray", "elsewhere", 443),
        ("mlflow", "elsewhere", 443),
        ("postgres", "elsewhere", 53),
    ],
)
def test_what_has_to_speak_may(source: str, target: str, port: int) -> None:
    assert may(source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("ray", "postgres", 5432),
        ("submitter", "mlflow", 5000),
        ("ray", "submitter", 8080),  # which no policy of its own guards
        ("elsewhere", "submitter", 8080),
        ("submitter", "ray", 6379),
        ("operator", "ray", 6379),
        ("operator", "postgres", 5432),
        ("elsewhere", "ray", 8265),
        ("elsewhere", "mlflow", 5000),
        ("elsewhere", "objects", 9000),
        ("ray", "elsewhere", 80),
        ("postgres", "elsewhere", 443),
        ("objects", "elsewhere", 443),
        ("mlflow", "ray", 6379),
        ("objects", "postgres", 5432),
    ],
)
def test_what_has_no_business_may_not(source: str, target: str, port: int) -> None:
    assert not may(source, target, port)
