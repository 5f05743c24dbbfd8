# SPDX-License-Identifier: Apache-2.0
"""Training data: read conversations with pictures from files, and make batches of them."""

from cumo.data.check import DataReport, check_data
from cumo.data.collator import Collator
from cumo.data.dataset import BadSampleError, ConversationDataset, Fault
from cumo.data.packing import PackedDataset
from cumo.data.sampler import ModalityLengthSampler
from cumo.data.sources import DataSource, read_sources

__all__ = [
    "BadSampleError",
    "Collator",
    "ConversationDataset",
    "DataReport",
    "DataSource",
    "Fault",
    "ModalityLengthSampler",
    "PackedDataset",
    "check_data",
    "read_sources",
]
