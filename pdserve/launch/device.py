"""The device an engine runs on."""

from pdserve.config.schema import Device


def find_device(device: Device) -> str:
    """ "cpu" or "cuda". Imports torch only when it has to look."""
    if device is not Device.AUTO:
        return device.value
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
