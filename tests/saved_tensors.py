"""What autograd keeps for the backward pass."""

from contextlib import contextmanager

import torch


@contextmanager
def saved_storages(network):
    """Storages that a forward pass within the block keeps, by address; those of the network's own tensors left out."""
    own = {each.untyped_storage().data_ptr() for each in (*network.parameters(), *network.buffers())}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found
