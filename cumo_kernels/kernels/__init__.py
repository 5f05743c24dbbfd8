# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launchers. Importing a module of this folder imports triton."""
