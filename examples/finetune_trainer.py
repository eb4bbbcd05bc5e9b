"""Fine-tune a pruned model with transformers' Trainer, and keep its zeros: python examples/finetune_trainer.py"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gossamer


def main() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))  # yours: gossamer.load("pruned")
    gossamer.prune(model, "Magnitude", "2:4")

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(256, (32, 32))]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, max_steps=8, use_cpu=True, report_to=[], dataloader_pin_memory=False)
        trainer = Trainer(model, settings, train_dataset=rows)
        with gossamer.hold(trainer.model, trainer.create_optimizer()) as held:
            trainer.train()
    print(held.check())


if __name__ == "__main__":
    main()
