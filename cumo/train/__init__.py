# SPDX-License-Identifier: Apache-2.0
"""Training: a stage from a recipe, exact over processes and interruptions. See docs/training.md."""

from cumo.train.files import load_recipe, shipped
from cumo.train.losses import NonFiniteError
from cumo.train.recipe import STAGES, Recipe
from cumo.train.stage import StageResult, check_recipe, run_stage

__all__ = [
    "STAGES",
    "NonFiniteError",
    "Recipe",
    "StageResult",
    "check_recipe",
    "load_recipe",
    "run_stage",
    "shipped",
]
