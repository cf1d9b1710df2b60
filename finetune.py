"""Fine-tune and score a pretrained encoder: the `finetune` stage, as a script that a launcher can start.

    python finetune.py --config configs/demo.yaml                                       one process
    torchrun --nproc_per_node 2 finetune.py --config configs/demo.yaml                  two
    accelerate launch --config_file launch/accelerate-cpu2.yaml finetune.py --config configs/demo.yaml

All do what `bertpipe finetune --config configs/demo.yaml` does. The model is this run's checkpoint, or any folder or
Hub id: `--finetune.model NAME`.
"""

import sys

from bertpipe.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["finetune", *sys.argv[1:]]))
