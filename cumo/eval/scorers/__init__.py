# SPDX-License-Identifier: Apache-2.0
"""Scorers of the benchmarks, one file each: pure functions from strings to scores, equal to the published ones.

None reads a file, asks a model or draws a random number of its own.
"""
