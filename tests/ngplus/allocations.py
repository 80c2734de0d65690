"""What memory a function takes while it runs, to the byte and the same every time."""

import itertools

import torch


def peak_elements(function):
    """Most float32 elements that were allocated at a time while ``function`` ran, inside of torch's kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 4
