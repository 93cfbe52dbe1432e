"""Random weights in the layout of torch-fidelity's Inception: what it gives means nothing, and is no zero."""

import torch
from torch import nn


def save_random_inception(path):
    """A file as torch-fidelity fetches it."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Blank(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, weights):
            """There are none yet."""

    fetch, theirs.load_state_dict_from_url = theirs.load_state_dict_from_url, lambda *words, **more: {}
    try:
        torch.manual_seed(0)
        blank = Blank("inception-v3-compat", ["2048"])
    finally:
        theirs.load_state_dict_from_url = fetch
    for module in blank.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(blank.state_dict(), path)
    return path
