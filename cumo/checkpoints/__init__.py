# SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoints, in the published layout and in that of this package."""
