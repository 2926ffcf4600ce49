"""Lightning: prune a LightningModule in its own class, and go on with the same Trainer.

pip install fxprune lightning
python examples/guides/lightning_module.py
"""

import tempfile

import lightning
import torch
from torch import nn
from torch.nn import functional as F

import fxprune


class Digits(lightning.LightningModule):
    def __init__(self, width=32):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(2 * width, 10),
        )  # fmt: skip

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(model, folder):
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    return trainer


torch.manual_seed(0)
images, labels = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
model = Digits()

with tempfile.TemporaryDirectory() as folder:
    # 1. Train, then prune. The result is a Digits, with its training_step, optimisers and hyperparameters.
    fit(model, folder)
    narrow = fxprune.prune(model, images[:2], ratio=0.5, into="module")
    assert type(narrow) is Digits
    assert [layer.out_channels for layer in narrow.net if isinstance(layer, nn.Conv2d)] == [16, 32]
    print(fxprune.verify(model, narrow, narrow.meta["fxprune"], images[:2]))

    # 2. Go on training.
    before = narrow.net[0].weight.detach().clone()
    trainer = fit(narrow, folder)
    assert not torch.equal(narrow.net[0].weight, before)

    # 3. A checkpoint of Lightning holds the weights. The plan makes the network that they fit of a new one.
    trainer.save_checkpoint(f"{folder}/narrow.ckpt")
    again = narrow.meta["fxprune"].apply(Digits())
    again.load_state_dict(torch.load(f"{folder}/narrow.ckpt")["state_dict"])
    narrow.eval(), again.eval()
    torch.testing.assert_close(again(images), narrow(images))
