# SPDX-License-Identifier: Apache-2.0
"""The parts of CuMo as transformers models."""

# The Auto classes import our models as soon as they are there (`cumo.auto`). So they come first: otherwise the first of
# our modules that names one of them would be half imported when the next one wants it.
import transformers.models.auto.modeling_auto  # noqa: F401
