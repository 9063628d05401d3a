"""The command line of the recipes: LightningCLI with a recipe's module and DataModule.

python -m bs_lightning.recipes simclr fit --config examples/simclr.yaml
"""

import importlib
import sys
from typing import Any

RECIPES = {
    "simclr": ("simclr.SimCLR", "images.ImageData"),
    "moco_v3": ("moco_v3.MoCoV3", "images.ImageData"),
    "simcse": ("simcse.SimCSE", "simcse.SentenceData"),
    "dual_encoder": ("dual_encoder.DualEncoder", "dual_encoder.PairData"),
    "clip": ("clip.CLIP", "clip.ImageTextData"),
    "graphcl": ("graphcl.GraphCL", "graphcl.GraphCLDataModule"),
    "mvgrl": ("mvgrl.MVGRL", "graph_data.GraphDataModule"),
}


def main(args: list[str]) -> Any:
    """Train or evaluate a recipe.

    Args:
        args: The recipe's name, and the arguments of LightningCLI.

    Returns:
        The LightningCLI.

    Raises:
        SystemExit: If the first argument is not the name of a recipe.
    """
    if not args or args[0] not in RECIPES:
        raise SystemExit(
            f"python -m bs_lightning.recipes RECIPE fit --config CONFIG: RECIPE must be one of {', '.join(RECIPES)}, "
            f"got {args[0] if args else 'nothing'}."
        )
    from lightning.pytorch.cli import LightningCLI  # not installed without the extra `cli`

    class RecipeCLI(LightningCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = parser.parse_args(args)  # Lightning's own warns that a command line was given, too

    model, data = (_imported(name) for name in RECIPES[args[0]])
    prog = f"python -m bs_lightning.recipes {args[0]}"
    return RecipeCLI(model, data, args=args[1:], parser_kwargs={"prog": prog})


def _imported(name: str) -> type:
    module, kind = name.split(".")
    found: type = getattr(importlib.import_module(f"bs_lightning.recipes.{module}"), kind)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
