# SPDX-License-Identifier: Apache-2.0
"""Use CuMo in other libraries. Each module needs the library that it is named after."""
