"""Describes an image, for people and for `--json`."""

from __future__ import annotations

from weightsmith.core.values import Json
from weightsmith.oci.image import Image

_SUMMARY = {
    "User": "user",
    "Env": "env",
    "Entrypoint": "entrypoint",
    "Cmd": "cmd",
    "WorkingDir": "working_dir",
    "ExposedPorts": "ports",
    "Healthcheck": "healthcheck",
}


def describe(image: Image) -> dict[str, Json]:
    """Return digest, platform, labels, annotations, layers and configuration as plain JSON.

    Sizes are bytes as stored; only the manifest and the configuration are read.
    """
    layers = [
        {
            "digest": layer.digest,
            "diff_id": layer.diff_id,
            "size": layer.size,
            "media_type": layer.media_type,
            "file": layer.file,
        }
        for layer in image.layers
    ]
    config = {ours: image.config[key] for key, ours in _SUMMARY.items() if key in image.config}
    if "ports" in config:
        config["ports"] = sorted(config["ports"] or ())
    return {
        "digest": image.digest,
        "config_digest": image.config_blob.digest,
        "media_type": image.media_type,
        "platform": image.platform,
        "created": image.settings.get("created"),
        "labels": dict(image.labels),
        "annotations": dict(image.annotations),
        "config": config,
        "layers": layers,
        "size": sum(layer.size for layer in image.layers),
    }
