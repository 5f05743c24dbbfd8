# SPDX-License-Identifier: Apache-2.0
"""The kernels inside other libraries; each module needs the library that it is named after."""
