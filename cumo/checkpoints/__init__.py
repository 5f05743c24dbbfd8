# SPDX-License-Identifier: Apache-2.0
"""Read and write checkpoints, in the published layout and in that of this package."""
