# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the published benchmarks offline, and adapters for the harnesses that people use.

`cumo.eval.scorers` turns answers into scores, `cumo.eval.tasks` reads the benchmarks' files, `cumo.eval.driver` asks a
model; `cumo.eval.command` is `cumo eval`.
"""
