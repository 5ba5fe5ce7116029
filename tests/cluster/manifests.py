"""Kubernetes manifests of `cluster/kuberay/`, and what KubeRay's own schemas say of them."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in documents(path) if document["kind"] == kind]


@functools.cache
def schema_of(kind: str, version: str = "v1") -> dict[str, Any]:
    """The schema of a kind in its resource definition, in which a field that it does not know is an error.

    Kubernetes drops such a field in silence, or refuses it when asked to be strict."""
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS does not name the folder of KubeRay's resource definitions")
    # libyaml's reader, as the definitions have tens of thousands of lines
    definition = yaml.load(Path(folder, f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    (schema,) = [
        v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == version and v["served"]
    ]
    schema["properties"]["metadata"] = {"type": "object"}  # the definition leaves it to Kubernetes
    _close(schema)
    return schema  # type: ignore[no-any-return]


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _close(item)
        return
    if not isinstance(schema, dict):
        return
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not open_ended:
        schema["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    for name, value in schema.items():
        if name == "properties":
            for inner in value.values():
                _close(inner)
        elif name in ("items", "additionalProperties", "anyOf", "oneOf", "allOf"):
            _close(value)


def validate(document: dict[str, Any]) -> None:
    """Raises: jsonschema.ValidationError."""
    schema = schema_of(document["kind"], document["apiVersion"].split("/")[1])
    jsonschema.Draft7Validator(schema).validate(document)


def gibibytes(quantity: str) -> int:
    number, unit = quantity[:-2], quantity[-2:]
    assert unit == "Gi"
    return int(number)
