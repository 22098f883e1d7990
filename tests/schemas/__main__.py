"""Makes the schemas that tests/test_launch.py holds the launch files against, without their prose:

    python -m tests.schemas jobset jobset.x-k8s.io_jobsets.yaml     the custom resource of JobSet (kubernetes-sigs/jobset, config/components/crd/bases)
    python -m tests.schemas sky                                     the task of SkyPilot, where skypilot is installed

Both are under Apache-2.0. Stored: JobSet of 2026-11 (v1alpha2), SkyPilot 0.14.1.
"""

import gzip
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent


def strict(node):
    """Without prose and defaults; an object takes the properties that it names and no other."""
    if isinstance(node, list):
        return [strict(x) for x in node]
    if not isinstance(node, dict):
        return node
    out = {k: strict(v) for k, v in node.items() if not (k == "description" and isinstance(v, str)) and k != "default" and not k.startswith("x-")}
    if isinstance(node.get("properties"), dict) and "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out


def jobset(path):
    import yaml
    schema = strict(yaml.safe_load(pathlib.Path(path).read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def sky():
    from sky.utils import schemas
    task = schemas.get_task_schema()
    task["properties"]["resources"] = schemas.get_resources_schema()
    return strict(task)


if __name__ == "__main__":
    made = {"jobset": jobset, "sky": sky}[sys.argv[1]](*sys.argv[2:])
    text = json.dumps(made, separators=(",", ":"), sort_keys=True).encode()
    (HERE / f"{sys.argv[1]}.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))
