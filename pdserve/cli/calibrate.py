"""`pdserve calibrate`: a simulator's profile of the deployment that is running."""

import json

import yaml

from pdserve.cli.admin import ask_admin
from pdserve.config.schema import Config
from pdserve.launch.device import find_device
from pdserve.launch.sizing import kv_group, max_model_len
from pdserve.model.config import load_config
from pdserve.simulator.calibration import calibrated
from pdserve.simulator.profile import PRESETS, KVShape, Profile

_REQUESTS = 1000
_LINKS = {"cpu": "demo-cpu", "cuda": "h200-8b"}
"""Device → preset whose link speeds are assumed."""


def calibrate(config: Config, host: str, port: int, api_key: str | None) -> str:
    """The profile as YAML. Raises a PdserveError that says what to do."""
    engines = json.loads(ask_admin(host, port, "/admin/steps", api_key))["engines"]
    requests = json.loads(ask_admin(host, port, f"/admin/requests?latest={_REQUESTS}", api_key))["requests"]
    profile = calibrated(base_profile(config), engines, requests)
    return yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False)


def base_profile(config: Config) -> Profile:
    """What the configuration alone tells; costs are the nearest preset's. Raises CheckpointError, ConfigError."""
    device = find_device(config.device)
    model = load_config(config.model_path)
    group = kv_group(config, model, device, model.num_kv_heads)
    preset = PRESETS[_LINKS[device]]
    return preset.model_copy(
        update={
            "name": config.model_name,
            "kv": KVShape(
                num_layers=group.num_layers,
                num_kv_heads=group.num_kv_heads,
                head_dim=group.head_dim,
                dtype=group.dtype,
            ),
            "max_model_len": max_model_len(config, model),
            "pools": config.pools,
        }
    )
