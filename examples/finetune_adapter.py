"""Fine-tune a pruned model with an adapter that keeps its zeros, in peft: python examples/finetune_adapter.py"""

import copy
import tempfile

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gossamer
from gossamer.hf import MaskLoRAConfig  # this import is what registers the adapters with peft


def main() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))  # yours: gossamer.load("pruned")
    gossamer.prune(base, "Magnitude", "2:4")
    kept = {name: weight != 0 for name, weight in base.named_parameters()}

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(256, (32, 32))]
    with tempfile.TemporaryDirectory() as folder:
        model = peft.get_peft_model(copy.deepcopy(base), MaskLoRAConfig(r=8))
        settings = TrainingArguments(folder, max_steps=8, use_cpu=True, report_to=[], dataloader_pin_memory=False)
        Trainer(model, settings, train_dataset=rows).train()
        model.save_pretrained(f"{folder}/adapter")  # the adapter alone, and a fingerprint of the zeros it was made on

        again = peft.PeftModel.from_pretrained(base, f"{folder}/adapter")
        plain = again.merge_and_unload()
    same = all(torch.equal(weight != 0, kept[name]) for name, weight in plain.named_parameters())
    print(f"{type(plain).__name__} with the same zeros: {same}")


if __name__ == "__main__":
    main()
