"""Make your own network vote: with a layer, and by surgery. Both give the same output."""

import torch
from torch import nn

from cropvote import CropVote, inject_crop_vote, per_view


def front() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def tail() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7)
    )


layered = nn.Sequential(front(), CropVote(tail())).eval()
plain = nn.Sequential(front(), tail()).eval()
plain[0].load_state_dict(layered[0].state_dict())
plain[1].load_state_dict(layered[1].tail.state_dict())  # a CropVote's keys begin with "tail."
injected = inject_crop_vote(plain, after="0", input_size=48)

images = torch.randn(2, 3, 48, 48)
with torch.no_grad():
    print("largest difference", float((layered(images) - injected(images)).abs().max()))
    print("classes", layered(images).argmax(1).tolist())
    print("class by view", per_view(layered, images).argmax(2).tolist())
