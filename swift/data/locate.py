"""Where the store of a run is: named by the settings, the sample scans, or a synthetic cohort."""

from __future__ import annotations

import logging
from pathlib import Path

from swift.config.schema_data import DataConfig
from swift.data.samples import SamplesUnavailable, sample_store
from swift.data.synthetic import synthetic_store

log = logging.getLogger(__name__)


def store_path(data: DataConfig, seed: int) -> Path:
    """Folder of the store that `data` names, made first where it is the sample or a synthetic cohort.

    Args:
        data: Settings.
        seed: Of a synthetic cohort.
    """
    if data.name == "store":
        # Of a mixture the DataModule opens all stores itself.
        return Path(data.path or data.mixture[0].path)
    if data.name == "sample":
        try:
            return sample_store(data)
        except SamplesUnavailable as error:
            log.warning("sample scans not available (%s): going on with the synthetic cohort instead", error)
    return synthetic_store(data, seed)
