"""The published names of the FID's Inception-v3.

pytorch-fid's and torch-fidelity's releases are the same file, pt_inception-2015-12-05-6726825d.pth, whose names are torchvision's and ours.
Files that were saved from their modules may count the batches of training and hold the auxiliary classifier, which are left out; so
may prefixes such as `inception.` be in front of all names. NVIDIA's inception-2015-12-05.pt is a program, which is not opened.
"""

from __future__ import annotations

from tinyldm.vendor_loaders.layout import Layout

LAYOUTS = {
    "pytorch-fid": Layout(r"(.*?)Conv2d_1a_3x3\.conv\.weight", lambda config: [],
                          lambda config: [(r".*\.num_batches_tracked$|^AuxLogits\..*", "")]),
}
