"""timm: prune a vision transformer in its own class, take its features, give it another head, fine-tune it.

pip install fxprune timm
python examples/guides/timm_models.py
"""

import timm
import torch

import fxprune

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10).eval()
images = torch.randn(2, 3, 32, 32)

# 1. Prune: whole attention heads and hidden units, in the class that timm knows.
plan = fxprune.plan(model, images, ratio=0.5, into="module", where=lambda group: group.exact)
narrow = plan.apply(model)
assert type(narrow) is type(model)
print(fxprune.verify(model, narrow, plan, images))
for note in plan.notes:
    print(note)

# 2. Methods that forward does not use go on working.
features = narrow.forward_features(images)
assert features.shape == model.forward_features(images).shape
narrow.reset_classifier(3)
assert narrow(images).shape == (2, 3)

# 3. Fine-tune: dropout and drop path follow train() and eval().
narrow.train()
optimizer = torch.optim.SGD(narrow.parameters(), lr=0.01)
labels = torch.tensor([0, 2])
losses = []
for _ in range(8):
    loss = torch.nn.functional.cross_entropy(narrow(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
