"""Hugging Face: prune a language model in its own class, generate, train, adapt, save and reopen it.

    pip install fxprune transformers accelerate peft
    python examples/guides/hugging_face.py

A small Llama with random weights stands for your own; nothing is downloaded.
"""

import tempfile

import torch
import transformers

import fxprune

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(3, 128, (2, 8))

# 1. Prune. The result is a LlamaForCausalLM: half of the hidden units and of the attention heads are gone.
# `uniform` keeps to what a configuration can say, so that transformers itself can open the files.
inputs = {"input_ids": ids, "use_cache": False}
plan = fxprune.plan(model, inputs, ratio=0.5, into="module", uniform=True, where=lambda group: group.exact)
narrow = plan.apply(model)
assert type(narrow) is transformers.LlamaForCausalLM
print(fxprune.verify(model, narrow, plan, inputs))

# 2. Generate, with the cache. The tokens are those of the original with the removed weights at zero.
prompt = ids[:1, :4]
tokens = narrow.generate(prompt, max_new_tokens=12, do_sample=False)
assert torch.equal(tokens, plan.mask(model).generate(prompt, max_new_tokens=12, do_sample=False))

# 3. Train: labels, loss and train mode are the class's own, though the example had none of them.
narrow.train()
optimizer = torch.optim.AdamW(narrow.parameters(), lr=1e-3)
before = narrow(input_ids=ids, labels=ids).loss.item()
for _ in range(5):
    loss = narrow(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = narrow(input_ids=ids, labels=ids).loss.item()
narrow.eval()
print(f"loss {before:.3f} -> {after:.3f}")
assert after < before

# 4. Train with the Trainer of transformers, which knows the class by its config and its forward.
try:
    import accelerate  # noqa: F401  the Trainer needs it
except ImportError:
    print("accelerate is not installed: no Trainer")
else:
    widths = {name: parameter.shape for name, parameter in narrow.named_parameters()}
    weight = narrow.model.layers[0].mlp.up_proj.weight
    untrained = weight.detach().clone()
    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            directory, max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
            save_strategy="steps", save_steps=3, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 128, (8, 8))]
        transformers.Trainer(narrow, arguments, train_dataset=rows).train()
        # `uniform` lets the narrowed model's config say its widths, so that its checkpoints open, too.
        checkpoint = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/checkpoint-3")
    narrow.eval()
    with torch.no_grad():
        torch.testing.assert_close(checkpoint(ids).logits, narrow(ids).logits)
    assert not torch.equal(weight, untrained)
    assert {name: parameter.shape for name, parameter in narrow.named_parameters()} == widths

# Without `uniform` the config stays that of the original, and from_pretrained does not open such checkpoints.
# Then the plan makes the network that their weights fit: plan.apply(transformers.LlamaForCausalLM(config)),
# and load_state_dict. What step 5 writes opens either way.

# 5. Save. What changed in the configuration is solved, and AutoModel opens the directory, without fxprune.
with tempfile.TemporaryDirectory() as directory:
    saved = fxprune.save_pretrained(narrow, directory)
    print(saved)
    assert saved.config == {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    again = transformers.AutoModelForCausalLM.from_pretrained(directory)
with torch.no_grad():
    torch.testing.assert_close(again(ids).logits, narrow(ids).logits)

# 6. Adapt: LoRA finds the layers by their names and widths.
try:
    import peft
except ImportError:
    print("peft is not installed: no adapter")
else:
    adapted = peft.get_peft_model(again, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
