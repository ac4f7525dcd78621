"""What a real API server refuses: unknown fields, and rules that are in no published schema."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate

Object = dict[str, Any]
Cause = tuple[str, str, str]  # reason, field, message

VERSION = "1.36"
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
_LABEL = re.compile(r"^([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$|^$")
_QUANTITY = re.compile(r"^[+-]?\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")


def unknown_fields(there: Object) -> str:
    """Errors of the server's strict decoding; empty if all fields are known."""
    try:
        kubernetes_validate.validate(there, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(map(str, error.path))
        return f"strict decoding error: {where}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        return ""  # a custom resource
    return ""


def causes(resource: str, there: Object) -> list[Cause]:
    """Everything that is wrong with an object."""
    found = [*_metadata(there)]
    if resource == "jobs":
        found += _job(there)
    return found


def _metadata(there: Object) -> list[Cause]:
    found: list[Cause] = []
    name = there["metadata"].get("name", "")
    if not _NAME.match(name) or len(name) > 63:
        found.append(("FieldValueInvalid", "metadata.name", f'Invalid value: "{name}": RFC 1123'))
    for label, value in (there["metadata"].get("labels") or {}).items():
        if not _LABEL.match(value) or len(value) > 63:
            where = f"metadata.labels[{label}]"
            found.append(("FieldValueInvalid", where, f'Invalid value: "{value}": a label'))
    return found


def _job(job: Object) -> list[Cause]:
    spec = job["spec"]
    pod = spec["template"]["spec"]
    found: list[Cause] = []

    def wrong(field: str, message: str, reason: str = "FieldValueInvalid") -> None:
        found.append((reason, field, message))

    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        wrong(
            "spec.template.spec.restartPolicy",
            'Required value: valid values: "OnFailure", "Never"',
            "FieldValueRequired",
        )
    if spec.get("completionMode", "NonIndexed") not in ("Indexed", "NonIndexed"):
        wrong("spec.completionMode", "Unsupported value", "FieldValueNotSupported")
    if spec.get("completionMode") == "Indexed":
        host = f"{job['metadata']['name']}-{spec['completions'] - 1}"
        if len(host) > 63:
            wrong("metadata.name", f'Invalid value: "{host}": must be no more than 63 characters')
    if "podFailurePolicy" in spec:
        if pod.get("restartPolicy") != "Never":
            wrong("spec.template.spec.restartPolicy", "only Never with podFailurePolicy")
        if spec.get("podReplacementPolicy", "Failed") != "Failed":
            wrong("spec.podReplacementPolicy", "only Failed with podFailurePolicy")
        for n, rule in enumerate(spec["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes", {})
            if codes.get("operator") == "In" and 0 in codes["values"]:
                wrong(f"spec.podFailurePolicy.rules[{n}].onExitCodes.values", "must not contain 0")
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for n, container in enumerate(pod["containers"]):
        where = f"spec.template.spec.containers[{n}]"
        for m, mount in enumerate(container.get("volumeMounts", [])):
            if mount["name"] not in volumes:
                wrong(f"{where}.volumeMounts[{m}].name", f'Not found: "{mount["name"]}"')
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        for name, value in [*limits.items(), *requests.items()]:
            if not _QUANTITY.match(str(value)):
                wrong(f"{where}.resources.{name}", f'Invalid value: "{value}": a quantity')
        for name in {*limits, *requests}:
            if "/" in name and requests.get(name, limits.get(name)) != limits.get(name):
                wrong(f"{where}.resources.requests", f"{name}: must be equal to its limit")
    return found
