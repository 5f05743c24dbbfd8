# SPDX-License-Identifier: Apache-2.0
"""The public operations: checks, choice of the backend, and autograd over the kernels.

On the triton backend each operation is a registered custom operator, opaque to torch.compile; kernels are
imported when first needed, so that the package works without triton.
"""
