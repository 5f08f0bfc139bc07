"""Configuration of training and validation: the options, their parsing and their checks."""

from ...errors import UsageError, nearest
from .arguments import learning_rate, mixup_options, model_arguments
from .flags import Parser
from .option import AT_LEAST_0, AT_LEAST_1, option
from .options import DataOptions, DeviceOptions, InputOptions, ValidateConfig
from .parsing import find_config, from_mapping, layered, parse_settings, read_yaml, to_yaml
from .train_options import TrainConfig

__all__ = [
    "AT_LEAST_0",
    "AT_LEAST_1",
    "DataOptions",
    "DeviceOptions",
    "InputOptions",
    "Parser",
    "TrainConfig",
    "UsageError",
    "ValidateConfig",
    "find_config",
    "from_mapping",
    "layered",
    "learning_rate",
    "mixup_options",
    "model_arguments",
    "nearest",
    "option",
    "parse_settings",
    "read_yaml",
    "to_yaml",
]
