"""Fine-tune a pruned model in a loop of your own, and keep its zeros: python examples/finetune_plain.py"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer


def main() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))  # yours: gossamer.load("pruned")
    gossamer.prune(model, "Magnitude", "2:4")

    tokens = torch.randint(256, (8, 4, 32))  # steps, batch, sequence
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with gossamer.hold(model, optimizer) as held:
        for batch in tokens:
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    print(held.check())


if __name__ == "__main__":
    main()
