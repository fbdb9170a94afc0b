"""numpy <-> Triton tensors inside a Python model; importable only there.

Under numpy 2 the Python backend's own ``as_numpy()`` and ``Tensor(name, array)`` give silently empty tensors.
DLPack is exact in both directions.
"""

import ctypes
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.argtypes = [ctypes.py_object, ctypes.c_char_p]
_CONSUMED = b"used_dltensor"


def to_array(tensor: Any) -> np.ndarray[Any, Any]:
    """The values of a ``pb_utils.Tensor``, not copied."""
    return np.from_dlpack(tensor)


def to_tensor(name: str, value: np.ndarray[Any, Any]) -> Any:
    """A ``pb_utils.Tensor`` holding ``value``, not copied where it is contiguous and writable."""
    capsule = np.require(value, requirements=["C", "W"]).__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The backend marks what it consumed with a name numpy does not know: numpy would log a traceback per tensor.
    _set_name(capsule, _CONSUMED)
    return tensor
