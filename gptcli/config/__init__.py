"""The one configuration schema and its YAML loader; no torch, numpy or terminal."""

from gptcli.config.loader import load_config
from gptcli.config.model import ModelConfig
from gptcli.config.schema import (
    Config,
    DataConfig,
    GenerateConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = ["Config", "DataConfig", "GenerateConfig", "ModelConfig", "OptimConfig",
           "TokenizerConfig", "TrainConfig", "load_config"]  # fmt: skip
