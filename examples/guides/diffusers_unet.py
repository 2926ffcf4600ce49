"""diffusers: prune a UNet in its own class, run it in a pipeline's loop, save and reopen it.

    pip install fxprune diffusers
    python examples/guides/diffusers_unet.py

A small UNet with random weights stands for your own; nothing is downloaded.
"""

import tempfile

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import fxprune

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
    norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
).eval()  # fmt: skip

# 1. Prune. A timestep is an input like any other. Groups that a normalisation runs over stay here, so that
# the images are those of the original with the removed weights at zero; without `where` they go, too.
inputs = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 5])}
plan = fxprune.plan(unet, inputs, ratio=0.5, into="module", where=lambda group: group.exact)
narrow = plan.apply(unet)
assert type(narrow) is UNet2DModel
print(
    f"{sum(p.numel() for p in unet.parameters())} -> {sum(p.numel() for p in narrow.parameters())} parameters"
)

# 2. Run a pipeline with it: the scheduler, the number of steps and the batch are the pipeline's own.
images = []
for model in (narrow, plan.mask(unet)):
    pipeline = DDIMPipeline(model, DDIMScheduler(num_train_timesteps=50))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    made = pipeline(batch_size=3, num_inference_steps=4, generator=noise, output_type="np").images
    images.append(torch.from_numpy(made))
assert images[0].shape == (3, 16, 16, 3)
torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)

# 3. Save and reopen. diffusers' own from_pretrained builds what the configuration says; fxprune's narrows it.
with tempfile.TemporaryDirectory() as directory:
    print(fxprune.save_pretrained(narrow, directory))
    again = fxprune.from_pretrained(directory)
assert type(again) is UNet2DModel
with torch.no_grad():
    torch.testing.assert_close(again(**inputs).sample, narrow(**inputs).sample)
