"""Fine-tune a pruned model with TRL, and keep its zeros: python examples/finetune_trl.py MODEL_DIRECTORY TEXT_FILE"""

import sys
import tempfile

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import gossamer


def main(source: str, text: str) -> None:
    model = gossamer.load(source)
    gossamer.prune(model, "Magnitude", "2:4")  # or load one that is pruned already

    with tempfile.TemporaryDirectory() as folder:
        rows = load_dataset("text", data_files=text, split="train", cache_dir=folder)
        settings = SFTConfig(folder, max_steps=8, use_cpu=True, bf16=False, report_to=[], dataloader_pin_memory=False)
        tokenizer = AutoTokenizer.from_pretrained(source)
        trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
        with gossamer.hold(trainer.model, trainer.create_optimizer()) as held:
            trainer.train()
    print(held.check())


if __name__ == "__main__":
    main(*sys.argv[1:])
