"""Choose where to split: list a network's valid sites with their cost, and take the earliest within a budget."""

import sys

import timm

from cropvote import inject_crop_vote, profile, suggest_site

name = sys.argv[1] if len(sys.argv) > 1 else "resnet10t"
model = timm.create_model(name, num_classes=7)
print(profile(model, sites=["layer1", "layer2", "layer3"] if name == "resnet10t" else None), "\n")

found = suggest_site(model, max_macs_ratio=3)
print(found.reason)
inject_crop_vote(model, after=found.site)
