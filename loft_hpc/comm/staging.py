"""Host copies of GPU buffers, for collectives that cannot take GPU memory."""

import torch
from torch import Tensor


class Staging:
    """Gives an engine a tensor that it can carry.

    CPU tensors pass through untouched, and so do GPU tensors if `direct` (NCCL, which refuses two ranks on one GPU). Otherwise a GPU tensor is copied through pinned host memory, allocated once for each name (and anew when it must grow).
    """

    def __init__(self, direct: bool):
        self._direct = direct
        self._buffers: dict[str, Tensor] = {}

    def host_like(self, tensor: Tensor, name: str) -> Tensor:
        """A buffer of the tensor's shape for an engine to fill; the tensor itself where it can be filled in place."""
        if self._direct or not tensor.is_cuda:
            return tensor
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < tensor.numel() or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
        return buffer[: tensor.numel()].view(tensor.shape)  # what an all-to-all carries has another size each time

    def to_host(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor's contents where an engine can read them."""
        buffer = self.host_like(tensor, name)
        if buffer is not tensor:
            buffer.copy_(tensor)  # waits for the GPU, so the contents are there when an engine's thread reads them
        return buffer

    def back(self, result: Tensor, tensor: Tensor) -> Tensor:
        """Brings a collective's result home into `tensor`."""
        if result.data_ptr() != tensor.data_ptr():
            tensor.copy_(result)
        return tensor
