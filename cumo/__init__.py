# SPDX-License-Identifier: Apache-2.0
"""CuMo (arXiv 2405.05949): a multimodal LLM with co-upcycled Mixture-of-Experts.

The fused expert layer that it is built on is the package `cumo_kernels`; `cumo.nn` makes modules of it.
"""

__version__ = "0.1.0"
