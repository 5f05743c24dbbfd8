# SPDX-License-Identifier: Apache-2.0
"""Register the experts implementation "cumo" with transformers (5.17 or newer), for every model with its interface:

    import cumo.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="cumo")
    model.set_experts_implementation("cumo")  # or for a model that is loaded already
    print(cumo.integrations.transformers.execution_paths(model))

`cumo.models.experts` says what runs fused and what does not.
"""

from cumo.models.experts import (
    NAME,
    ExpertsModule,
    activation_name,
    check_supported,
    execution_paths,
    experts_forward,
)

__all__ = ["NAME", "ExpertsModule", "activation_name", "check_supported", "execution_paths", "experts_forward"]
