# SPDX-License-Identifier: Apache-2.0
"""Training data: conversations with pictures, from files to batches."""

from cumo.data.collator import Collator
from cumo.data.dataset import BadSampleError, ConversationDataset, Fault
from cumo.data.sampler import ModalityLengthSampler
from cumo.data.sources import DataSource, read_sources

__all__ = [
    "BadSampleError",
    "Collator",
    "ConversationDataset",
    "DataSource",
    "Fault",
    "ModalityLengthSampler",
    "read_sources",
]
