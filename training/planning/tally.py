"""How much memory the tensors of a process hold, and what it sends to other ranks: counted operation by operation.

In: whatever runs inside ``with Tally(...)``, on real tensors or on fake ones, which have shapes and no memory. Out:
bytes held now, at the peak, and sent. What a kernel allocates for itself and frees again is not seen. Cost: 10 to 20 us
an operation.

Sent bytes are those of the ring algorithms, in which no rank sends more than another: gathering or reducing N parts
sends all but one of them, reducing to everybody is both.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Sized = Callable[[tuple[Any, ...], Any], Any]
"""What a collective moves, whole, among its arguments and its result."""

COLLECTIVES: dict[str, tuple[float, Sized]] = {  # name of the operation -> how often a ring passes it on, and what
    "c10d._allgather_base_": (1, lambda arguments, result: arguments[0]),
    "c10d.allgather_": (1, lambda arguments, result: arguments[0]),
    "c10d._reduce_scatter_base_": (1, lambda arguments, result: arguments[1]),
    "c10d.reduce_scatter_": (1, lambda arguments, result: arguments[1]),
    "c10d.allreduce_": (2, lambda arguments, result: arguments[0]),
    "c10d.broadcast_": (1, lambda arguments, result: arguments[0]),
    "_c10d_functional.all_gather_into_tensor": (1, lambda arguments, result: result),
    "_c10d_functional.reduce_scatter_tensor": (1, lambda arguments, result: arguments[0]),
    "_c10d_functional.all_reduce": (2, lambda arguments, result: arguments[0]),
    "_c10d_functional.all_reduce_": (2, lambda arguments, result: arguments[0]),
    "_c10d_functional.broadcast": (1, lambda arguments, result: arguments[0]),
}
SILENT = ("barrier", "wait_tensor", "_wrap_tensor_autograd")


class Tally(TorchDispatchMode):
    """Bytes of the tensors made inside; several spans of time are told apart by `restart`.

    :param num_ranks: how many ranks a collective joins.
    :param number: what reading a number out of a fake tensor, which has none, gives.
    """

    def __init__(self, num_ranks: int, number: float | None = None):
        super().__init__()
        self.held = 0
        self.peak = 0
        self.sent = 0.0
        self._share = (num_ranks - 1) / num_ranks
        self._number = number
        self._sizes: dict[int, int] = {}
        self._stack = ExitStack()

    def restart(self) -> None:
        """Forget peak and sent bytes; what is held stays."""
        self.peak, self.sent = self.held, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self._number is not None and func is torch.ops.aten._local_scalar_dense.default:
            return self._number
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        self._see_collective(func, args, result)
        return result

    def see(self, tensor: Tensor) -> None:
        """Count the memory of a tensor, once; of a distributed one its shard."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        if key not in self._sizes and tensor.device.type != "meta":
            self._sizes[key] = 0
            self._resized(key, storage.nbytes())
            weakref.finalize(storage, self._freed, key)

    def _resized(self, key: int, size: int) -> None:
        self.held += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.held)

    def _freed(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

    def _see_collective(self, func: Any, arguments: tuple[Any, ...], result: Any) -> None:
        if "c10d" not in (name := func.name().replace("::", ".")) or name.endswith(SILENT):
            return
        times, moved = COLLECTIVES[name.removesuffix(".default")]
        leaves = [leaf for leaf in tree_leaves(moved(arguments, result)) if isinstance(leaf, Tensor)]
        self.sent += times * self._share * sum(leaf.nbytes for leaf in leaves)

    def __enter__(self) -> "Tally":
        self._stack.enter_context(self._resizes())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _resizes(self) -> AbstractContextManager[Any]:
        """FSDP frees and fills its gathered weights by resizing their storage, which is no operation of torch's."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._resized(storage._cdata, size)
            return result

        return patch.object(torch.UntypedStorage, "resize_", counted)
