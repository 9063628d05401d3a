"""Trains both graph recipes under two processes: ``python graph_run.py FOLDER``. Each rank writes what it has seen."""

import json
import sys
from pathlib import Path

import torch
from graph_parts import RECIPES, Indices, tiny_graphs
from lightning.pytorch import seed_everything
from parts import trainer, walker


def main(folder):
    seen = {}
    for name, (model, data) in RECIPES.items():
        seed_everything(0)
        module, indices = model(), Indices()
        made = trainer(walker(16), indices, strategy="ddp", devices=2)
        made.fit(module, datamodule=data(tiny_graphs(), batch_size=4))
        weights = [float(p.sum()) for p in module.parameters()]
        seen[name] = {"epochs": indices.epochs, "weights": weights, "loss": float(made.callback_metrics["train/loss"])}
    (folder / f"rank{made.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.barrier()  # gloo's threads may abort a process that leaves while the other is still there
    torch.distributed.destroy_process_group()
