"""What memory a function takes while it runs, to the byte and the same every time."""

import itertools

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_elements(function):
    """Most float32 elements that were allocated at a time while ``function`` ran, inside of torch's kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 4


class LiveStorages(TorchDispatchMode):
    """Knows the memory of all tensors that operations have taken or made since it is on, and that are still alive.

    The profiler does not: where a thread of a collective lets go of a tensor, it misses that.

    Attributes:
        peak: the most bytes after an operation.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, output)):
            if isinstance(each, torch.Tensor):
                self.add(each)
        self._alive = {key: each for key, each in self._alive.items() if not each.expired()}
        self.peak = max(self.peak, sum(map(_nbytes, self._alive.values())))
        return output

    def add(self, tensor):
        """Count a tensor that was there before."""
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        reference = StorageWeakRef(local.untyped_storage())
        self._alive.setdefault(reference.cdata, reference)


def _nbytes(reference):
    """Of a storage that may have been resized since."""
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return 0 if storage is None else storage.nbytes()
