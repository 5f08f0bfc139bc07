"""A look at the first sample of a stream, before training waits for samples that never come."""

import logging
from copy import copy
from dataclasses import replace
from typing import Any

from ...errors import UsageError

__all__ = ["check_stream"]


def check_stream(dataset: Any, split: str) -> None:
    """Refuse a split in WebDataset's format whose first shard has no sample that can be read.

    timm's reader drops every sample that it cannot read, so that it may drop all of them.

    Args:
        dataset: timm's data set over the stream, which is left as it is.
        split: The name of the split, for the message.

    Raises:
        UsageError: If no sample of the first shard has an image and a label.
    """
    reader = copy(dataset.reader)
    reader.is_training, reader.ds = False, None
    reader.dist_rank, reader.dist_num_replicas = 0, 1  # every rank looks at the same shard
    reader.split_info = replace(reader.split_info, filenames=reader.split_info.filenames[:1])
    logger = logging.getLogger(type(reader).__module__)
    disabled, logger.disabled = logger.disabled, True  # a line for every sample
    try:
        first = next(iter(reader), None)
    except (KeyError, OSError, ValueError) as error:
        raise UsageError(f"split {split!r}: {' '.join(str(error).split())}") from None
    finally:
        logger.disabled = disabled
    if first is None:
        raise UsageError(
            f"the first shard of split {split!r} ({', '.join(reader.split_info.filenames)}) cannot "
            "be read, or none of its samples has an image and, in .cls, its label as a number; "
            "--target-key names a field of .json instead"
        )
