"""Make a timm model vote: one training step, then the vote. Replace the random images with yours."""

import timm
import torch

from cropvote import CropVoteLoss, inject_crop_vote

model = timm.create_model("resnet10t", num_classes=7)  # pretrained=True for its weights
inject_crop_vote(model, after="layer1", train_views=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loss = CropVoteLoss(torch.nn.CrossEntropyLoss())
images, labels = torch.randn(4, 3, 176, 176), torch.tensor([0, 1, 2, 3])

value = loss(model.train()(images), labels)  # a loss on two views of each image
value.backward()
optimizer.step()
with torch.no_grad():
    votes = model.eval()(images)  # (4, 7): the vote of all ten views
print(f"loss {value:.3f}; classes {votes.argmax(1).tolist()}")
