"""Models: loading them, finding their decoder layers and operators, running them layer by layer."""

from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import (
    capture_layer_calls,
    copy_layer,
    entering_states,
    group_input,
    group_inputs,
    layer_inputs,
    layer_weight,
    run_layer,
    set_layer_weight,
)
from sparseserve.models.loading import LoadedModel, load_model
from sparseserve.models.structure import (
    LayerStructure,
    ModelStructure,
    Operator,
    OperatorGroup,
    trace_structure,
)

__all__ = [
    "LayerCall",
    "LayerStructure",
    "LoadedModel",
    "ModelStructure",
    "Operator",
    "OperatorGroup",
    "capture_layer_calls",
    "copy_layer",
    "entering_states",
    "group_input",
    "group_inputs",
    "layer_inputs",
    "layer_weight",
    "load_model",
    "run_layer",
    "set_layer_weight",
    "trace_structure",
]
