"""What vLLM makes of settings on a machine with a GPU of compute capability 9.0, though there is none: JSON on the last line.

    cuda_config.py MODEL SETTINGS...     SETTINGS: JSON, keyword arguments of vLLM's `EngineArgs`

For each SETTINGS: "mode", "graphs" and "splitting" of the compilation, the "op" that a mixture would be run by, what was
"said" in the log, or "refused". vLLM's own code resolves it, its platform for CUDA included; what it asks of a driver is
answered here.
"""

import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import engines  # noqa: F401  (its environment)
import xorz.vllm
from vllm import platforms
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models import mixtral, qwen3  # noqa: F401  (so that they ask the CPU for their kernels)
from vllm.platforms.interface import DeviceCapability


def on_a_gpu():
    """Have vLLM take this for a machine with a GPU."""
    get_quantization_config("awq")  # what this imports looks at kernels, once
    # The kernels, which a vLLM for the CPU has not.
    sys.modules["vllm._C_stable_libtorch"] = ModuleType("vllm._C_stable_libtorch")
    from vllm.platforms.cuda import CudaPlatformBase

    class Here(CudaPlatformBase):
        """A GPU that is not there."""

        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "none")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 80 << 30)
        device_count = classmethod(lambda cls: 1)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)

    here = Here()
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm") and "current_platform" in vars(module):
            module.current_platform = here
    platforms._current_platform = here


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def resolved(model, settings):
    said = Said()
    logger = logging.getLogger("vllm.xorz")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        config = EngineArgs(model, **settings).create_engine_config()
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        logger.removeHandler(said)
    own = config.compilation_config
    if config.quant_config is None:
        return {"graphs": own.cudagraph_mode.name, "splitting": own.splitting_ops}
    with set_current_vllm_config(config):
        method = config.quant_config.get_quant_method(routed(), "")
        runner = SimpleNamespace(_shared_experts=None, routed_experts=SimpleNamespace(quant_method=method))
        op = MoERunner._select_forward(runner)
    return {
        "mode": own.mode.name,
        "graphs": own.cudagraph_mode.name,
        "splitting": own.splitting_ops,
        "sizes": len(own.cudagraph_capture_sizes),
        "op": getattr(op, "_qualified_op_name", None) or op.__qualname__,
        "said": said.lines,
    }


def routed():
    """Experts' parameters, as far as the choice of a method asks."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from xorz.vllm import experts

    experts.unserved = lambda moe: None
    out = RoutedExperts.__new__(RoutedExperts)
    out.__dict__["moe_config"] = SimpleNamespace()
    return out


if __name__ == "__main__":
    xorz.vllm.register()
    on_a_gpu()
    print("\n" + json.dumps([resolved(sys.argv[1], json.loads(given)) for given in sys.argv[2:]]), flush=True)
