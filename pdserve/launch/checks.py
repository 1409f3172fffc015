"""What is looked at before anything is started."""

from pdserve.config.schema import Config
from pdserve.core.errors import ConfigError


def check_model(config: Config) -> None:
    """Raises ConfigError when the model is no checkpoint."""
    if not (config.model_path / "config.json").is_file():
        raise ConfigError(f"model: {config.model_path} has no config.json; give a Hugging Face checkpoint directory")
